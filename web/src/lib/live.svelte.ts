/** The WebSocket connection: the list of runs, the queue, and the events of the run that is shown. */
import { notifyOfEnds } from "./notifications.svelte";
import type { FollowRequest, LiveUpdate, Queue, RunSummary } from "./types";

/** Queued runs first, then those that were started last. */
function newestFirst(a: RunSummary, b: RunSummary): number {
  return Number(b.state === "queued") - Number(a.state === "queued") || (b.started_t ?? 0) - (a.started_t ?? 0);
}

export type Connection = "connecting" | "open" | "lost";
const MAX_RETRY_MS = 10_000;

interface Subscription {
  request: Required<FollowRequest>;
  onUpdate: (message: LiveUpdate) => void;
}

class LiveFeed {
  runs = $state.raw<RunSummary[] | null>(null);
  queue = $state.raw<Queue | null>(null);
  connection = $state<Connection>("connecting");
  #subscription: Subscription | null = null;
  #socket: WebSocket | null = null;
  #wait_ms = 500;
  #timer = 0;

  constructor() {
    addEventListener("online", () => this.#retryNow());
    document.addEventListener("visibilitychange", () => document.hidden || this.#retryNow());
  }

  /** Open the connection if it is not open; the first page that needs live data calls this. */
  open(): void {
    if (this.#socket !== null) return;
    const address = new URL("api/v1/live", document.baseURI);
    address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
    address.hash = "";
    const socket = new WebSocket(address);
    this.#socket = socket;
    socket.onopen = () => {
      this.#wait_ms = 500;
      this.connection = "open";
      this.#sendRequest();
    };
    socket.onmessage = (event: MessageEvent<string>) => this.#receive(JSON.parse(event.data) as LiveUpdate);
    socket.onclose = () => {
      this.#socket = null;
      this.connection = "lost";
      this.#timer = window.setTimeout(() => this.open(), this.#wait_ms);
      this.#wait_ms = Math.min(MAX_RETRY_MS, this.#wait_ms * 2);
    };
  }

  /** Follow a run's events from byte `since` and its log from byte `logSince`; a lost connection continues
   * where it was. Returns a function that ends the subscription. */
  follow(run: string, since: number, logSince: number, onUpdate: (message: LiveUpdate) => void): () => void {
    const subscription: Subscription = { request: { run, since, log_since: logSince }, onUpdate };
    this.#subscription = subscription;
    this.open();
    this.#sendRequest();
    return () => {
      if (this.#subscription !== subscription) return;
      this.#subscription = null;
      this.#sendRequest();
    };
  }

  run(id: string): RunSummary | undefined {
    return this.runs?.find((run) => run.id === id);
  }

  #sendRequest(): void {
    if (this.#socket?.readyState !== WebSocket.OPEN) return;
    const request: FollowRequest = this.#subscription?.request ?? { run: null, since: 0, log_since: 0 };
    this.#socket.send(JSON.stringify(request));
  }

  #receive(message: LiveUpdate): void {
    this.#applyRuns(message);
    if (message.queue !== null) this.queue = message.queue;
    const subscription = this.#subscription;
    if (subscription === null || message.run !== subscription.request.run) return;
    const { request } = subscription;
    // sent before the server received a new request: the events in between are still to come
    if ((message.start ?? 0) > request.since) return;
    if (message.end !== null) request.since = message.start === 0 ? message.end : Math.max(message.end, request.since);
    if (message.log !== null) request.log_since = message.log.end;
    subscription.onUpdate(message);
  }

  /** The first message has all runs, the next ones what changed. */
  #applyRuns({ runs, changed = [], removed = [] }: LiveUpdate): void {
    if (runs !== null && runs !== undefined) {
      this.runs = runs;
    } else if (this.runs !== null && changed.length + removed.length > 0) {
      notifyOfEnds(this.runs, changed);
      const gone = new Set([...removed, ...changed.map((run) => run.id)]);
      this.runs = [...changed, ...this.runs.filter((run) => !gone.has(run.id))].sort(newestFirst);
    }
  }

  #retryNow(): void {
    if (this.#socket !== null || this.connection !== "lost") return;
    clearTimeout(this.#timer);
    this.open();
  }
}

export const live = new LiveFeed();
