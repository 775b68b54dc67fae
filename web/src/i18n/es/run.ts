import type { Words } from "../../lib/i18n.svelte";

export const run: Words["run"] = {
  title: "Entrenamiento",
};
