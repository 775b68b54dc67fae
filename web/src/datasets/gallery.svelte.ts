/** The pictures of a dataset: pages as they come into view, captions with the way back. */
import { SvelteMap } from "svelte/reactivity";
import { api, Refused, url } from "../lib/api";
import { explain, toasts } from "../lib/toast.svelte";
import type { DatasetItem, DatasetItemPage } from "../lib/types";
import { fill } from "../lib/fill";
import { i18n } from "../lib/i18n.svelte";

export type Only = "all" | "uncaptioned" | "captioned" | "refused";
export interface Cut {
  resolution: number;
  resolution_type: "pixel_area" | "pixel" | "area";
  crop: boolean;
  crop_aspect: "preserve" | "closest" | "square";
  crop_style: "center" | "random" | "corner";
}
export type Part = "picture" | "caption";
interface Edit {
  at: number;
  file: string;
  before: string | null;
  after: string | null;
}

const PAGE = 60;
const KEPT_PAGES = 40;
const UNREAD_MS = 1500;
const ROUTE = "/api/v1/datasets/{name}/captions/{path}";

export class Gallery {
  total = $state<number | null>(null);
  unread = $state(0);
  only = $state<Only>("all");
  cut = $state.raw<Cut>({ resolution: 1024, resolution_type: "pixel_area", crop: true, crop_aspect: "preserve", crop_style: "center" });
  why = $state("");
  /** Where the keyboard is, and where it is to go once that card is there. */
  active = $state(0);
  moves = $state(0);
  focus = $state.raw<{ at: number; part: Part } | null>(null);
  readonly typed = new SvelteMap<string, string>();
  readonly saving = new SvelteMap<string, "saving" | "saved">();
  readonly failed = new SvelteMap<string, string>();
  readonly conflicts = new SvelteMap<string, string | null>();
  edits = $state.raw<Edit[]>([]);
  readonly #pages = new SvelteMap<number, DatasetItem[]>();
  readonly #fresh = new Set<number>();
  /** Pictures that no longer match the filter but stay where they are: file -> index. */
  readonly #left = new Map<string, number>();
  #generation = 0;
  #range: [number, number] = [0, 0];
  #queue: Promise<unknown> = Promise.resolve();
  #timer = 0;

  constructor(readonly name: string) {}

  item(at: number): DatasetItem | undefined {
    return this.#pages.get(Math.floor(at / PAGE))?.[at % PAGE];
  }

  show(only: Only): void {
    this.only = only;
    this.active = 0;
    this.total = null;
    this.#pages.clear();
    this.refresh();
  }

  cutAs(cut: Cut): void {
    this.cut = cut;
    this.refresh();
  }

  /** Ask again for what is in view; what is shown stays until then. */
  refresh(): void {
    this.#generation += 1;
    this.#fresh.clear();
    this.#left.clear();
    this.want(...this.#range);
  }

  close(): void {
    this.#generation += 1;
    clearTimeout(this.#timer);
  }

  want(first: number, last: number): void {
    this.#range = [first, last];
    for (let page = Math.floor(first / PAGE); page <= Math.floor(Math.max(0, last) / PAGE); page++) {
      if (!this.#fresh.has(page)) void this.#load(page);
    }
  }

  async #load(page: number): Promise<void> {
    const generation = this.#generation;
    this.#fresh.add(page);
    const gone = [...this.#left.values()].filter((at) => at < page * PAGE).length;
    const query = { offset: page * PAGE - gone, limit: PAGE, only: this.only, ...this.cut };
    try {
      const found: DatasetItemPage & { unread?: number } = await api.get("/api/v1/datasets/{name}/items", { path: { name: this.name }, query });
      if (generation !== this.#generation) return;
      this.#pages.set(page, found.items);
      this.total = found.total + this.#left.size;
      this.why = "";
      this.#forget(page);
      this.#readOn(found.unread ?? 0);
    } catch (error) {
      if (generation !== this.#generation) return;
      this.#fresh.delete(page);
      this.total ??= 0;
      this.why = explain(error);
    }
  }

  #forget(now: number): void {
    for (const page of this.#pages.keys()) {
      if (this.#pages.size <= KEPT_PAGES) return;
      if (Math.abs(page - now) > KEPT_PAGES / 2) {
        this.#pages.delete(page);
        this.#fresh.delete(page);
      }
    }
  }

  /** The server still reads the folder. */
  #readOn(unread: number): void {
    this.unread = unread;
    clearTimeout(this.#timer);
    if (unread > 0) this.#timer = window.setTimeout(() => this.refresh(), UNREAD_MS);
  }

  edit(at: number, text: string): void {
    const item = this.item(at);
    this.typed.delete(item?.file ?? "");
    if (item === undefined || text === (item.caption_text ?? "")) return;
    void this.#write(at, item.file, text, item.caption_text, true);
  }

  /** What is still being saved is the last edit too. */
  async undo(): Promise<void> {
    await this.#queue;
    const last = this.edits.at(-1);
    if (last === undefined) return;
    this.edits = this.edits.slice(0, -1);
    const done = await this.#write(last.at, last.file, last.before ?? "", last.after, false);
    if (done) toasts.done(fill(i18n.t.datasets.undoDone, { file: last.file }));
  }

  /** One after the other, so that an undo meets what it undoes. */
  #write(at: number, file: string, text: string, before: string | null, remember: boolean): Promise<boolean> {
    const done = this.#queue.then(() => this.#send(at, file, text, before, remember));
    this.#queue = done;
    return done;
  }

  async #send(at: number, file: string, text: string, before: string | null, remember: boolean): Promise<boolean> {
    this.saving.set(file, "saving");
    this.failed.delete(file);
    try {
      const ask = { path: { name: this.name, path: file }, query: { ...this.cut }, body: { text, before } };
      const now = (await api.put(ROUTE, ask)).items[0];
      if (now !== undefined) this.#put(at, now);
      if (remember) this.edits = [...this.edits, { at, file, before, after: now?.caption_text ?? null }];
      this.conflicts.delete(file);
      this.saving.set(file, "saved");
      return true;
    } catch (error) {
      this.saving.delete(file);
      this.failed.set(file, explain(error));
      if (remember) this.typed.set(file, text);
      if (error instanceof Refused && error.status === 409) await this.#conflict(at, file, text);
      return false;
    }
  }

  #put(at: number, item: DatasetItem): void {
    const page = this.#pages.get(Math.floor(at / PAGE));
    if (page?.[at % PAGE]?.file !== item.file) return this.refresh();
    this.#pages.set(Math.floor(at / PAGE), page.with(at % PAGE, item));
    const captioned = item.captions.length > 0;
    const stays = this.only === "all" || this.only === "refused" || captioned === (this.only === "captioned");
    if (stays) this.#left.delete(item.file);
    else this.#left.set(item.file, at);
  }

  /** What the file says now, beside what was to be written. */
  async #conflict(at: number, file: string, text: string): Promise<void> {
    const query = { offset: at, limit: 1, only: this.only, ...this.cut };
    const now = (await api.get("/api/v1/datasets/{name}/items", { path: { name: this.name }, query })).items[0];
    if (now === undefined || now.file !== file) return this.refresh();
    this.#put(at, now);
    this.typed.set(file, text);
    this.conflicts.set(file, now.caption_text);
    this.failed.delete(file);
  }

  settle(at: number, file: string, mine: boolean): void {
    const text = this.typed.get(file) ?? "";
    this.typed.delete(file);
    this.conflicts.delete(file);
    if (mine) this.edit(at, text);
  }

  /** The page goes away while a caption is being typed. */
  leave(): void {
    for (const [file, text] of this.typed) {
      const item = [...this.#pages.values()].flat().find((one) => one.file === file);
      if (item === undefined || text === (item.caption_text ?? "") || this.conflicts.has(file)) continue;
      void fetch(url(ROUTE, { name: this.name, path: file }), {
        method: "PUT",
        keepalive: true,
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ text, before: item.caption_text }),
      });
    }
  }

  move(to: number, part: Part): void {
    const at = Math.max(0, Math.min((this.total ?? 1) - 1, to));
    this.active = at;
    this.moves += 1;
    this.focus = { at, part };
  }
}
