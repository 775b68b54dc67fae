/** Uploads files, three at a time; connection errors are retried, and rejected files are listed with the reason. */
import { url } from "../lib/api";
import { i18n } from "../lib/i18n.svelte";
import type { UploadResult } from "../lib/types";
import { isSupported, type UploadFile } from "./droppedFiles";

interface Sending {
  path: string;
  /** Share of the bytes that were sent, 0 to 1. */
  progress: number;
  attempt: number;
}
export interface Failure extends UploadFile {
  reason: string;
}

const MAX_CONCURRENT = 3;
const MAX_ATTEMPTS = 4;
const wait = (ms: number) => new Promise((done) => setTimeout(done, ms));

/** status 0: the connection failed. */
interface UploadResponse {
  status: number;
  text: string;
}

export class Uploader {
  total = $state(0);
  done = $state(0);
  saved = $state(0);
  /** Paths of files with an unsupported suffix. */
  skipped = $state.raw<string[]>([]);
  sending = $state<Sending[]>([]);
  refused = $state.raw<{ file: string; reason: string }[]>([]);
  failed = $state.raw<Failure[]>([]);
  /** All files are sent, and the page has loaded the updated dataset. */
  finished = $state(false);
  stopped = $state(false);
  #waiting: UploadFile[] = [];
  readonly #open = new Set<XMLHttpRequest>();

  constructor(
    readonly name: string,
    readonly callbacks: { unreachable: () => string; ended: () => Promise<unknown> },
  ) {}

  get busy(): boolean {
    return this.sending.length > 0;
  }

  add(files: UploadFile[]): void {
    if (!this.busy) {
      [this.total, this.done, this.saved] = [0, 0, 0];
      [this.skipped, this.refused, this.failed] = [[], [], []];
      [this.finished, this.stopped] = [false, false];
    }
    const supported = files.filter((file) => isSupported(file.path));
    this.skipped = [...this.skipped, ...files.filter((file) => !isSupported(file.path)).map((file) => file.path)];
    this.total += supported.length;
    // captions first, so that an image is never shown without its caption
    const isCaption = (file: UploadFile) => Number(/\.txt$/i.test(file.path));
    this.#waiting.push(...supported.sort((a, b) => isCaption(b) - isCaption(a)));
    while (this.sending.length < MAX_CONCURRENT && this.#waiting.length > 0) void this.#runWorker();
  }

  retry(): void {
    this.add(this.failed);
  }

  stop(): void {
    this.stopped = true;
    this.#waiting = [];
    for (const request of this.#open) request.abort();
  }

  async #runWorker(): Promise<void> {
    for (let next = this.#waiting.shift(); next !== undefined; next = this.#waiting.shift()) {
      this.sending.push({ path: next.path, progress: 0, attempt: 1 });
      const path = next.path;
      await this.#upload(next, this.sending.find((file) => file.path === path)!);
      this.sending = this.sending.filter((file) => file.path !== path);
      this.done += 1;
    }
    if (this.busy) return;
    await this.callbacks.ended();
    this.finished = !this.busy;
  }

  async #upload(file: UploadFile, status: Sending): Promise<void> {
    for (;;) {
      const response = await this.#send(file, status);
      if (this.stopped && response.status === 0) return;
      if (response.status >= 200 && response.status < 300) {
        const result = JSON.parse(response.text) as UploadResult;
        this.saved += result.saved.length;
        this.refused = [...this.refused, ...result.refused];
        return;
      }
      const isTemporary = response.status === 0 || response.status === 429 || response.status >= 502;
      if (!isTemporary || status.attempt >= MAX_ATTEMPTS) return this.#fail(file, response, isTemporary);
      await wait(500 * 2 ** status.attempt);
      status.attempt += 1;
    }
  }

  #fail(file: UploadFile, response: UploadResponse, isTemporary: boolean): void {
    const reason = response.status === 0 ? this.callbacks.unreachable() : errorMessage(response);
    if (isTemporary || response.status >= 500) this.failed = [...this.failed, { ...file, reason }];
    else this.refused = [...this.refused, { file: file.path, reason }];
  }

  #send(file: UploadFile, status: Sending): Promise<UploadResponse> {
    return new Promise((done) => {
      const request = new XMLHttpRequest(); // fetch does not report the progress of an upload
      this.#open.add(request);
      request.open("PUT", url("/api/v1/datasets/{name}/files/{path}", { name: this.name, path: file.path }));
      request.setRequestHeader("content-type", "application/octet-stream");
      request.setRequestHeader("accept-language", i18n.language);
      request.upload.onprogress = (event) => (status.progress = event.loaded / Math.max(1, event.total));
      request.onloadend = () => {
        this.#open.delete(request);
        done({ status: request.status, text: request.responseText });
      };
      request.send(file.file);
    });
  }
}

function errorMessage(response: UploadResponse): string {
  try {
    const body = JSON.parse(response.text) as { detail?: { message: string }[] };
    return body.detail?.map((item) => item.message).join("; ") || `HTTP ${response.status}`;
  } catch {
    return `HTTP ${response.status}`;
  }
}
