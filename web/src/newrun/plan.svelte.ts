/** The memory plan of what is being edited: asked for again until it is ready. */
import { api } from "../lib/api";
import { explain } from "../lib/toast.svelte";
import type { ErrorDetail, PlanResponse } from "../lib/types";
import type { Values } from "./values";

/** What `simpletuner plan --json` prints. Sizes are bytes, `peak` those of the device in its worst moment. */
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
  fit?: { limit: number; chosen: { size: number; seconds: number } | null };
  options?: Values;
}

const SETTLE_MS = 700;
const SLOWEST_MS = 1500;
const wait = (ms: number) => new Promise((done) => setTimeout(done, ms));

/** Ask until it is known. `current` false: nobody wants it any more. */
export async function ready(body: { config: Values; datasets: Values[]; fit?: string }, current: () => boolean): Promise<PlanResponse | null> {
  for (let pause = 500; current(); pause = Math.min(SLOWEST_MS, pause * 1.5)) {
    const state = await api.post("/api/v1/plan", { body });
    if (state.state !== "pending") return current() ? state : null;
    await wait(pause);
  }
  return null;
}

export function planOf(state: PlanResponse): Plan | null {
  return state.state === "ready" ? (state.plan as Plan | null | undefined) ?? null : null;
}

export class PlanWatch {
  plan = $state.raw<Plan | null>(null);
  problems = $state.raw<ErrorDetail[]>([]);
  pending = $state(false);
  waiting = $state(false);
  #asked = 0;
  #timer = 0;
  #last = "";

  /** The settings cannot be planned as they stand. */
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
    const asked = this.#asked;
    this.#timer = window.setTimeout(() => void this.#run(asked, config, datasets), SETTLE_MS);
  }

  async #run(asked: number, config: Values, datasets: Values[]): Promise<void> {
    const current = () => asked === this.#asked;
    try {
      const state = await ready({ config, datasets }, current);
      if (state === null) return;
      this.plan = planOf(state);
      this.problems = state.problems ?? [];
    } catch (error) {
      const message = explain(error);
      if (!current()) return;
      this.plan = null;
      this.problems = [{ loc: "", message, where: "" }];
    }
    this.pending = false;
  }

  close(): void {
    clearTimeout(this.#timer);
    this.#asked += 1;
    this.#last = "";
    this.pending = false;
  }
}
