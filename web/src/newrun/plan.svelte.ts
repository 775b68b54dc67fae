/** The memory plan of the draft: requested again until it is ready. */
import { api } from "../lib/api";
import { explain } from "../lib/toast.svelte";
import type { ErrorDetail, PlanResponse } from "../lib/types";
import type { Values } from "./values";

/** The output of `simpletuner plan --json`. Sizes are in bytes; `peak` is the highest use of device memory. */
export interface Plan {
  kind: string;
  parts: Record<string, number>;
  allowances: Record<string, number>;
  before: Record<string, number>;
  host: Record<string, number>;
  disk: Record<string, number>;
  trained: number;
  feed: { samples: number; size_px: [number, number]; text_rows: number };
  memory: { checkpointed: number; swapped: number };
  assumed: boolean;
  training: number;
  peak: number;
  seconds: number;
  seconds_on: string;
  world: { processes: number; local: number; mode: string };
  base_bytes: number;
  sent_bytes: number;
  fit?: { limit: number; chosen: { size: number; seconds: number } | null };
  options?: Values;
}

const DEBOUNCE_MS = 700;
const MAX_POLL_MS = 1500;
const wait = (ms: number) => new Promise((done) => setTimeout(done, ms));

/** Request a plan until it is ready. Returns null when `isCurrent` becomes false. */
export async function pollPlan(body: { config: Values; datasets: Values[]; fit?: string }, isCurrent: () => boolean, onpending: (pending: PlanResponse) => void = () => undefined): Promise<PlanResponse | null> {
  for (let pause = 500; isCurrent(); pause = Math.min(MAX_POLL_MS, pause * 1.5)) {
    const state = await api.post("/api/v1/plan", { body });
    if (state.state !== "pending") return isCurrent() ? state : null;
    if (isCurrent()) onpending(state);
    await wait(pause);
  }
  return null;
}

export function planOf(state: PlanResponse): Plan | null {
  return state.state === "ready" ? (state.plan as Plan | null | undefined) ?? null : null;
}

export class PlanPoller {
  plan = $state.raw<Plan | null>(null);
  problems = $state.raw<ErrorDetail[]>([]);
  /** Measured by estimated time of a step in an earlier run, and the name of that run. */
  correction = $state<number | null>(null);
  correctedBy = $state("");
  progress = $state("");
  pending = $state(false);
  waiting = $state(false);
  #requests = 0;
  #timer = 0;
  #last = "";

  /** The expected time of a step: the estimate, corrected by what an earlier run has measured. */
  get seconds(): number {
    return (this.plan?.seconds ?? 0) * (this.correction ?? 1);
  }

  /** Wait for valid settings; the present ones cannot be planned. */
  wait(): void {
    this.close();
    this.waiting = true;
  }

  ask(config: Values, datasets: Values[]): void {
    const wanted = JSON.stringify([config, datasets]);
    if (wanted === this.#last && !this.waiting) return;
    this.close();
    this.#last = wanted;
    this.waiting = false;
    this.pending = true;
    const request = this.#requests;
    this.#timer = window.setTimeout(() => void this.#run(request, config, datasets), DEBOUNCE_MS);
  }

  async #run(request: number, config: Values, datasets: Values[]): Promise<void> {
    const isCurrent = () => request === this.#requests;
    try {
      const state = await pollPlan({ config, datasets }, isCurrent, (pending) => (this.progress = pending.progress ?? ""));
      if (state === null) return;
      this.plan = planOf(state);
      [this.correction, this.correctedBy] = [state.correction ?? null, state.corrected_by ?? ""];
      this.problems = state.problems ?? [];
    } catch (error) {
      const message = explain(error);
      if (!isCurrent()) return;
      this.plan = null;
      this.problems = [{ loc: "", message, where: "", suggestion: "" }];
    }
    this.pending = false;
  }

  close(): void {
    clearTimeout(this.#timer);
    this.#requests += 1;
    this.#last = "";
    this.pending = false;
  }
}
