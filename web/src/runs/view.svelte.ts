/** What the page of one run knows: asked for once, then kept up by the live connection. */
import { api, isUnreached, Refused } from "../lib/api";
import { live } from "../lib/live.svelte";
import { explain } from "../lib/toast.svelte";
import type { LiveUpdate, LogPart, RunMetrics, RunImage, RunDetail, RunStage } from "../lib/types";
import type { RunEvent } from "./events";
import { add } from "./pictures";
import { append } from "./series";

const MAX_POINTS = 2000; // asked for; live ones are added until there are twice as many
const KEPT_LOG = 400_000; // characters
const LOG_PART = 65_536;
const AGAIN_MS = 1000;
const CHANGES_DETAIL = new Set(["saved", "noted", "warned", "checkpoint_set_aside", "finished", "failed"]);

export class RunView {
  detail = $state.raw<RunDetail | null>(null);
  metrics = $state.raw<RunMetrics | null>(null);
  pictures = $state.raw<RunImage[]>([]);
  log = $state.raw<LogPart | null>(null);
  stages = $state.raw<RunStage[]>([]);
  stagesDone = $state.raw<string[]>([]);
  problem = $state("");
  #unfollow: () => void = () => undefined;
  #closed = false;
  #loads = 0;
  #asked = 0;
  #told = 0;

  constructor(readonly id: string) {}

  /** Everything anew: at the start, and when a process begins to work on the run again. */
  async load(): Promise<void> {
    this.#unfollow();
    const load = ++this.#loads;
    const asked = ++this.#asked;
    const path = { id: this.id };
    try {
      const [detail, metrics, pictures, log] = await Promise.all([
        api.get("/api/v1/runs/{id}", { path }),
        api.get("/api/v1/runs/{id}/metrics", { path, query: { max_points: MAX_POINTS } }),
        api.get("/api/v1/runs/{id}/pictures", { path }),
        api.get("/api/v1/runs/{id}/log", { path, query: { since: -LOG_PART, limit: LOG_PART } }),
      ]);
      if (this.#closed || load !== this.#loads) return;
      this.#tell(detail, asked);
      [this.metrics, this.pictures, this.log] = [metrics, pictures, log];
      this.problem = "";
      const since = Math.min(detail.events_end, metrics.end);
      this.#unfollow = live.follow(this.id, since, log.end, (message) => this.#hear(message));
    } catch (error) {
      if (this.#closed || load !== this.#loads) return;
      this.problem = explain(error);
      this.#later(error, () => this.load());
    }
  }

  /** The detail alone: checkpoints, outputs, notes. */
  async refresh(): Promise<void> {
    const asked = ++this.#asked;
    try {
      this.#tell(await api.get("/api/v1/runs/{id}", { path: { id: this.id } }), asked);
    } catch (error) {
      this.#later(error, () => this.refresh());
    }
  }

  /** A server that is not reached may be on its way back. What it refuses, the next change asks for again. */
  #later(error: unknown, again: () => Promise<void>): void {
    if (!(error instanceof Refused)) throw error;
    if (isUnreached(error)) setTimeout(() => this.#closed || void again(), AGAIN_MS);
  }

  async olderLog(): Promise<void> {
    const log = this.log;
    if (log === null || log.start === 0) return;
    const since = Math.max(0, log.start - LOG_PART);
    const query = { since, limit: log.start - since };
    const older = await api.get("/api/v1/runs/{id}/log", { path: { id: this.id }, query });
    this.log = { ...log, text: older.text + log.text, start: older.start };
  }

  close(): void {
    this.#closed = true;
    this.#unfollow();
  }

  /** asked: when, among all askings; an answer that was overtaken by a later one is old. */
  #tell(detail: RunDetail, asked: number): void {
    if (this.#closed || asked < this.#told) return;
    this.#told = asked;
    this.detail = detail;
    this.stages = detail.stages;
    this.stagesDone = detail.stages_done;
  }

  #hear(message: LiveUpdate): void {
    const events = message.events as unknown as RunEvent[];
    if (events.some((event) => event.kind === "run_started" || event.kind === "resumed")) {
      void this.load(); // the server cuts the abandoned tail
      return;
    }
    if (this.metrics !== null) this.metrics = append(this.metrics, events);
    this.pictures = add(this.pictures, events.filter((event) => event.kind === "image"));
    for (const event of events) this.#stage(event);
    if (message.log !== null) this.#write(message.log);
    if (events.some((event) => CHANGES_DETAIL.has(event.kind))) void this.refresh();
    if ((this.metrics?.step.length ?? 0) > 2 * MAX_POINTS) void this.load(); // thinned by the server
  }

  #stage(event: RunEvent): void {
    if (event.kind === "step") {
      if (this.stages.length > 0) this.stages = [];
    } else if (event.kind === "stage_started") {
      const stage: RunStage = { stage: event.stage, done: 0, total: event.total, unit: event.unit, left_s: null };
      this.stages = [...this.stages.filter((one) => one.stage !== event.stage), stage];
    } else if (event.kind === "stage_progress") {
      const { done, total, left_s } = event;
      this.stages = this.stages.map((one) => (one.stage === event.stage ? { ...one, done, total, left_s } : one));
    } else if (event.kind === "stage_done") {
      this.stages = this.stages.filter((one) => one.stage !== event.stage);
      this.stagesDone = [...this.stagesDone.filter((one) => one !== event.stage), event.stage];
    }
  }

  #write(part: LogPart): void {
    const log = this.log;
    if (log === null || part.start !== log.end) {
      this.log = part.start === 0 ? part : log; // the file was begun anew
      return;
    }
    const text = log.text + part.text;
    const cut = text.length > KEPT_LOG ? text.indexOf("\n", text.length - KEPT_LOG) + 1 : 0;
    const dropped = cut === 0 ? 0 : new TextEncoder().encode(text.slice(0, cut)).length;
    this.log = { text: text.slice(cut), start: log.start + dropped, end: part.end, size: part.size };
  }
}
