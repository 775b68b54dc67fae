/** The preset for a machine: the largest that fits the memory of its GPU, nano without one. */
import type { FormSchema, SystemInfo } from "../lib/types";

/** Return the id, null if no preset fits. */
export function recommendPreset(schema: FormSchema, system: SystemInfo): string | null {
  const memory = Math.max(0, ...system.devices.filter(({ kind }) => kind !== "cpu").map((device) => device.memory_total_bytes ?? 0));
  if (memory === 0) return "nano";
  return schema.presets.findLast((preset) => preset.planned_gb !== null && preset.planned_gb * 1e9 <= memory && Number.parseFloat(preset.title) * 1e9 <= memory * 1.1)?.id ?? null;
}
