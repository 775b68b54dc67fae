/** The WebSocket connection: the runs that change, the queue, and the events of the run that is shown. */
import { i18n } from "./i18n.svelte";
import { notifyOfEnds } from "./notifications.svelte";
import type { FollowRequest, LiveUpdate, Queue, RunSummary } from "./types";

export type Connection = "connecting" | "open" | "lost";
const MAX_RETRY_MS = 10_000;

/** Called with the runs that changed and the ids of those that are gone; null after a connection was opened. */
type RunListener = (changed: RunSummary[] | null, removed: string[]) => void;

interface Subscription {
  request: Required<FollowRequest>;
  onUpdate: (message: LiveUpdate) => void;
}

class LiveFeed {
  /** The runs that have not ended, and those that have changed since the connection was opened. */
  runs = $state.raw<RunSummary[] | null>(null);
  queue = $state.raw<Queue | null>(null);
  connection = $state<Connection>("connecting");
  readonly #listeners = new Set<RunListener>();
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
    address.search = `?language=${i18n.language}`; // of the messages of runs; a browser cannot send its header here
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

  /** Call a function at each change of the list of runs; returns a function that ends this. */
  onRuns(listener: RunListener): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
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

  /** The first message has the runs that have not ended, the next ones what changed. */
  #applyRuns({ runs, changed = [], removed = [] }: LiveUpdate): void {
    const isFirst = runs !== null && runs !== undefined;
    if (isFirst) this.runs = runs;
    if (this.runs !== null && changed.length + removed.length > 0) {
      notifyOfEnds(this.runs, changed);
      const gone = new Set([...removed, ...changed.map((run) => run.id)]);
      this.runs = [...changed, ...this.runs.filter((run) => !gone.has(run.id))];
    }
    if (!isFirst && changed.length + removed.length === 0) return;
    for (const listener of this.#listeners) listener(isFirst ? null : changed, removed);
  }

  /** Connect again, with the present language. */
  reconnect(): void {
    this.#wait_ms = 0;
    this.#socket?.close();
  }

  #retryNow(): void {
    if (this.#socket !== null || this.connection !== "lost") return;
    clearTimeout(this.#timer);
    this.open();
  }
}

export const live = new LiveFeed();
