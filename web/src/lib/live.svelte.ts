/** The one WebSocket: runs, queue, and the events of the run that is being looked at. */
import type { FollowRequest, LiveUpdate, Queue, RunSummary } from "./types";

export type Connection = "connecting" | "open" | "lost";
const SLOWEST_MS = 10_000;

interface Followed {
  ask: Required<FollowRequest>;
  hear: (message: LiveUpdate) => void;
}

class LiveFeed {
  runs = $state.raw<RunSummary[] | null>(null);
  queue = $state.raw<Queue | null>(null);
  connection = $state<Connection>("connecting");
  #followed: Followed | null = null;
  #socket: WebSocket | null = null;
  #wait_ms = 500;
  #timer = 0;

  constructor() {
    addEventListener("online", () => this.#retryNow());
    document.addEventListener("visibilitychange", () => document.hidden || this.#retryNow());
  }

  /** Idempotent: the first page that needs live data opens the connection. */
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
      this.#say();
    };
    socket.onmessage = (event: MessageEvent<string>) => this.#hear(JSON.parse(event.data) as LiveUpdate);
    socket.onclose = () => {
      this.#socket = null;
      this.connection = "lost";
      this.#timer = window.setTimeout(() => this.open(), this.#wait_ms);
      this.#wait_ms = Math.min(SLOWEST_MS, this.#wait_ms * 2);
    };
  }

  /** Hear a run's events from byte `since` and its log from `logSince`; after a break from where it was.
   * The answer ends it. */
  follow(run: string, since: number, logSince: number, hear: (message: LiveUpdate) => void): () => void {
    const followed: Followed = { ask: { run, since, log_since: logSince }, hear };
    this.#followed = followed;
    this.open();
    this.#say();
    return () => {
      if (this.#followed !== followed) return;
      this.#followed = null;
      this.#say();
    };
  }

  run(id: string): RunSummary | undefined {
    return this.runs?.find((one) => one.id === id);
  }

  #say(): void {
    if (this.#socket?.readyState !== WebSocket.OPEN) return;
    const ask: FollowRequest = this.#followed?.ask ?? { run: null, since: 0, log_since: 0 };
    this.#socket.send(JSON.stringify(ask));
  }

  #hear(message: LiveUpdate): void {
    if (message.runs !== null) this.runs = message.runs;
    if (message.queue !== null) this.queue = message.queue;
    const followed = this.#followed;
    if (followed === null || message.run !== followed.ask.run) return;
    // on its way when the question changed: what lies between is still to come
    if ((message.start ?? 0) > followed.ask.since) return;
    if (message.end !== null) followed.ask.since = message.start === 0 ? message.end : Math.max(message.end, followed.ask.since);
    if (message.log !== null) followed.ask.log_since = message.log.end;
    followed.hear(message);
  }

  #retryNow(): void {
    if (this.#socket !== null || this.connection !== "lost") return;
    clearTimeout(this.#timer);
    this.open();
  }
}

export const live = new LiveFeed();
