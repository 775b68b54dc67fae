/** Files on their way: three at once, those that meet a bad line sent again, what is refused told one by one. */
import { url } from "../lib/api";
import type { UploadResult } from "../lib/types";
import { isTaken, type Found } from "./drop";

interface Sending {
  path: string;
  part: number;
  attempt: number;
}
export interface Failure extends Found {
  why: string;
}

const AT_ONCE = 3;
const ATTEMPTS = 4;
const wait = (ms: number) => new Promise((done) => setTimeout(done, ms));

/** status 0: the line broke. */
interface Answer {
  status: number;
  text: string;
}

export class Uploader {
  total = $state(0);
  done = $state(0);
  saved = $state(0);
  skipped = $state(0);
  sending = $state<Sending[]>([]);
  refused = $state.raw<{ file: string; reason: string }[]>([]);
  failed = $state.raw<Failure[]>([]);
  /** All is in, and the page has looked at what the dataset holds now. */
  settled = $state(false);
  stopped = $state(false);
  #waiting: Found[] = [];
  readonly #open = new Set<XMLHttpRequest>();

  constructor(
    readonly name: string,
    readonly told: { unreachable: () => string; ended: () => Promise<unknown> },
  ) {}

  get busy(): boolean {
    return this.sending.length > 0;
  }

  add(found: Found[]): void {
    if (!this.busy) {
      [this.total, this.done, this.saved, this.skipped] = [0, 0, 0, 0];
      [this.refused, this.failed, this.settled, this.stopped] = [[], [], false, false];
    }
    const taken = found.filter((one) => isTaken(one.path));
    this.skipped += found.length - taken.length;
    this.total += taken.length;
    // captions first: a picture is then never seen without its own
    this.#waiting.push(...taken.sort((one, other) => Number(/\.txt$/i.test(other.path)) - Number(/\.txt$/i.test(one.path))));
    while (this.sending.length < AT_ONCE && this.#waiting.length > 0) void this.#lane();
  }

  retry(): void {
    this.add(this.failed);
  }

  stop(): void {
    this.stopped = true;
    this.#waiting = [];
    for (const request of this.#open) request.abort();
  }

  async #lane(): Promise<void> {
    for (let next = this.#waiting.shift(); next !== undefined; next = this.#waiting.shift()) {
      this.sending.push({ path: next.path, part: 0, attempt: 1 });
      const path = next.path;
      await this.#one(next, this.sending.find((one) => one.path === path)!);
      this.sending = this.sending.filter((one) => one.path !== path);
      this.done += 1;
    }
    if (this.busy) return;
    await this.told.ended();
    this.settled = !this.busy;
  }

  async #one(found: Found, shown: Sending): Promise<void> {
    for (;;) {
      const answer = await this.#send(found, shown);
      if (this.stopped && answer.status === 0) return;
      if (answer.status >= 200 && answer.status < 300) {
        const told = JSON.parse(answer.text) as UploadResult;
        this.saved += told.saved.length;
        this.refused = [...this.refused, ...told.refused];
        return;
      }
      const passing = answer.status === 0 || answer.status === 429 || answer.status >= 502;
      if (!passing || shown.attempt >= ATTEMPTS) return this.#fail(found, answer, passing);
      await wait(500 * 2 ** shown.attempt);
      shown.attempt += 1;
    }
  }

  #fail(found: Found, answer: Answer, passing: boolean): void {
    const why = answer.status === 0 ? this.told.unreachable() : reason(answer);
    if (passing || answer.status >= 500) this.failed = [...this.failed, { ...found, why }];
    else this.refused = [...this.refused, { file: found.path, reason: why }];
  }

  #send(found: Found, shown: Sending): Promise<Answer> {
    return new Promise((done) => {
      const request = new XMLHttpRequest(); // fetch tells no progress of what is sent
      this.#open.add(request);
      request.open("PUT", url("/api/v1/datasets/{name}/files/{path}", { name: this.name, path: found.path }));
      request.setRequestHeader("content-type", "application/octet-stream");
      request.upload.onprogress = (event) => (shown.part = event.loaded / Math.max(1, event.total));
      request.onloadend = () => {
        this.#open.delete(request);
        done({ status: request.status, text: request.responseText });
      };
      request.send(found.file);
    });
  }
}

function reason(answer: Answer): string {
  try {
    const body = JSON.parse(answer.text) as { detail?: { message: string }[] };
    return body.detail?.map((one) => one.message).join("; ") || `HTTP ${answer.status}`;
  } catch {
    return `HTTP ${answer.status}`;
  }
}
