/** Filtering and sorting of the list of runs. */
import type { RunSummary } from "../lib/types";

export type StateFilter = "any" | "active" | "done" | "ended";
export type SortKey = "newest" | "name" | "loss" | "progress";
export interface ListFilter {
  words: string;
  state: StateFilter;
  archived: boolean;
  sort: SortKey;
}

const STATES: Record<StateFilter, (state: RunSummary["state"]) => boolean> = {
  any: () => true,
  active: (state) => ["queued", "starting", "caching", "running", "stopping"].includes(state),
  done: (state) => state === "done",
  ended: (state) => ["failed", "lost", "stopped"].includes(state),
};

const ORDERS: Record<SortKey, ((a: RunSummary, b: RunSummary) => number) | null> = {
  newest: null, // the order of the list
  name: (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }),
  loss: (a, b) => (a.loss ?? Infinity) - (b.loss ?? Infinity),
  progress: (a, b) => share(b) - share(a),
};

function share(run: RunSummary): number {
  return run.total_steps ? run.step / run.total_steps : 0;
}

/** True if the name, a tag or the note contains each word. */
function contains(run: RunSummary, words: string): boolean {
  const text = [run.name, run.note ?? "", ...(run.tags ?? [])].join(" ").toLowerCase();
  return words.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

export function select(runs: RunSummary[], filter: ListFilter): RunSummary[] {
  const shown = runs.filter((run) => STATES[filter.state](run.state) && (filter.archived || !run.archived) && contains(run, filter.words.trim()));
  const order = ORDERS[filter.sort];
  return order === null ? shown : shown.sort(order);
}
