/** The data of one run's page: loaded once, then updated by the live connection. */
import { api, isUnreachable, ApiError } from "../lib/api";
import { live } from "../lib/live.svelte";
import { explain } from "../lib/toast.svelte";
import type { LiveUpdate, LogPart, RunMetrics, RunImage, RunDetail, RunStage } from "../lib/types";
import type { RunEvent } from "./events";
import { add } from "./imageGrid";
import { append } from "./series";

const MAX_POINTS = 2000; // requested; live steps are added until there are twice as many
const MAX_LOG_CHARS = 400_000;
const LOG_PART = 65_536; // bytes per request
const RETRY_MS = 1000;
const CHANGES_DETAIL = new Set(["saved", "noted", "warned", "checkpoint_set_aside", "finished", "failed", "verdict", "prompts"]);

export class RunView {
  detail = $state.raw<RunDetail | null>(null);
  metrics = $state.raw<RunMetrics | null>(null);
  images = $state.raw<RunImage[]>([]);
  log = $state.raw<LogPart | null>(null);
  stages = $state.raw<RunStage[]>([]);
  stagesDone = $state.raw<string[]>([]);
  /** Version of the preview of images that are being sampled. */
  preview = $state<number | null>(null);
  problem = $state("");
  #unfollow: () => void = () => undefined;
  #closed = false;
  #loads = 0;
  #detailRequests = 0;
  #shownRequest = 0;

  constructor(readonly id: string) {}

  /** Load everything, at the start and whenever a process starts or resumes the run. */
  async load(): Promise<void> {
    this.#unfollow();
    const load = ++this.#loads;
    const request = ++this.#detailRequests;
    const path = { id: this.id };
    try {
      const [detail, metrics, images, log] = await Promise.all([
        api.get("/api/v1/runs/{id}", { path }),
        api.get("/api/v1/runs/{id}/metrics", { path, query: { max_points: MAX_POINTS } }),
        api.get("/api/v1/runs/{id}/pictures", { path }),
        api.get("/api/v1/runs/{id}/log", { path, query: { since: -LOG_PART, limit: LOG_PART } }),
      ]);
      if (this.#closed || load !== this.#loads) return;
      this.#setDetail(detail, request);
      [this.metrics, this.images, this.log] = [metrics, images, log];
      this.problem = "";
      const since = Math.min(detail.events_end, metrics.end);
      this.#unfollow = live.follow(this.id, since, log.end, (message) => this.#update(message));
    } catch (error) {
      if (this.#closed || load !== this.#loads) return;
      this.problem = explain(error);
      this.#retryLater(error, () => this.load());
    }
  }

  /** Load only the details: checkpoints, outputs, notes. */
  async refresh(): Promise<void> {
    const request = ++this.#detailRequests;
    try {
      this.#setDetail(await api.get("/api/v1/runs/{id}", { path: { id: this.id } }), request);
    } catch (error) {
      this.#retryLater(error, () => this.refresh());
    }
  }

  /** Retry if the server could not be reached. After an error response, the next change loads the data again. */
  #retryLater(error: unknown, load: () => Promise<void>): void {
    if (!(error instanceof ApiError)) throw error;
    if (isUnreachable(error)) setTimeout(() => this.#closed || void load(), RETRY_MS);
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

  /** request: number of the request; a response that arrives after that of a later request is ignored. */
  #setDetail(detail: RunDetail, request: number): void {
    if (this.#closed || request < this.#shownRequest) return;
    this.#shownRequest = request;
    this.detail = detail;
    this.stages = detail.stages;
    this.stagesDone = detail.stages_done;
  }

  #update(message: LiveUpdate): void {
    const events = message.events as unknown as RunEvent[];
    this.preview = message.preview ?? null;
    if (events.some((event) => event.kind === "run_started" || event.kind === "resumed")) {
      void this.load(); // the server removes the steps that a resume made void
      return;
    }
    if (this.metrics !== null) this.metrics = append(this.metrics, events);
    this.images = add(this.images, events.filter((event) => event.kind === "image"));
    for (const event of events) this.#updateStage(event);
    if (message.log !== null) this.#appendLog(message.log);
    if (events.some((event) => CHANGES_DETAIL.has(event.kind))) void this.refresh();
    if ((this.metrics?.step.length ?? 0) > 2 * MAX_POINTS) void this.load(); // downsampled again by the server
  }

  #updateStage(event: RunEvent): void {
    if (event.kind === "step") {
      if (this.stages.length > 0) this.stages = [];
    } else if (event.kind === "stage_started") {
      const stage: RunStage = { stage: event.stage, done: 0, total: event.total, unit: event.unit, left_s: null };
      this.stages = [...this.stages.filter((other) => other.stage !== event.stage), stage];
    } else if (event.kind === "stage_progress") {
      const { done, total, left_s } = event;
      this.stages = this.stages.map((stage) => (stage.stage === event.stage ? { ...stage, done, total, left_s } : stage));
    } else if (event.kind === "stage_done") {
      this.stages = this.stages.filter((stage) => stage.stage !== event.stage);
      this.stagesDone = [...this.stagesDone.filter((stage) => stage !== event.stage), event.stage];
    }
  }

  #appendLog(part: LogPart): void {
    const log = this.log;
    if (log === null || part.start !== log.end) {
      this.log = part.start === 0 ? part : log; // the file was replaced
      return;
    }
    const text = log.text + part.text;
    const cut = text.length > MAX_LOG_CHARS ? text.indexOf("\n", text.length - MAX_LOG_CHARS) + 1 : 0;
    const dropped = cut === 0 ? 0 : new TextEncoder().encode(text.slice(0, cut)).length;
    this.log = { text: text.slice(cut), start: log.start + dropped, end: part.end, size: part.size };
  }
}
