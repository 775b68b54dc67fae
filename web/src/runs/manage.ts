/** Deleting, archiving and labelling of runs. Deleting can be undone. */
import { api } from "../lib/api";
import { fill } from "../lib/fill";
import { i18n } from "../lib/i18n.svelte";
import { toasts } from "../lib/toast.svelte";
import type { RunSummary, TrashEntry } from "../lib/types";

/** Say that something was moved to the trash, with a button that restores it. */
export function offerUndo(entries: TrashEntry[], restored: () => unknown = () => undefined): void {
  const t = i18n.t.common.trash;
  const name = entries.length === 1 ? (entries[0]?.label ?? "") : fill(t.several, { n: entries.length });
  toasts.success(fill(t.deleted, { name }), {
    label: t.undo,
    run: async () => {
      for (const { id } of entries) await api.post("/api/v1/trash/{id}/restore", { path: { id } });
      toasts.success(fill(t.restored, { name }));
      await restored();
    },
  });
}

export async function deleteRuns(runs: RunSummary[]): Promise<void> {
  const entries: TrashEntry[] = [];
  try {
    for (const { id } of runs) entries.push(await api.delete("/api/v1/runs/{id}", { path: { id } }));
  } finally {
    if (entries.length > 0) offerUndo(entries);
  }
}

/** Change a part of the label of a run. */
export async function label(run: RunSummary, change: { name?: string; tags?: string[]; note?: string; archived?: boolean }): Promise<void> {
  const folder = run.path.split("/").at(-1) ?? "";
  const body = { name: run.name === folder ? "" : run.name, tags: run.tags ?? [], note: run.note ?? "", archived: run.archived ?? false, ...change };
  await api.put("/api/v1/runs/{id}/label", { path: { id: run.id }, body });
}
