/** The images of a dataset: pages are loaded as they come into view, and edits of captions can be undone. */
import { SvelteMap } from "svelte/reactivity";
import { api, ApiError, url } from "../lib/api";
import { explain, toasts } from "../lib/toast.svelte";
import type { DatasetItem, DatasetItemPage } from "../lib/types";
import { fill } from "../lib/fill";
import { i18n } from "../lib/i18n.svelte";

export type ImageFilter = "all" | "uncaptioned" | "captioned" | "refused" | "excluded" | "duplicate" | "small";
export type ImageSort = "name" | "shortest" | "longest";
export interface CropOptions {
  resolution: number;
  resolution_type: "pixel_area" | "pixel" | "area";
  crop: boolean;
  crop_aspect: "preserve" | "closest" | "square";
  crop_style: "center" | "random" | "corner";
}
export type CardPart = "image" | "caption";
interface Edit {
  at: number;
  file: string;
  before: string | null;
  after: string | null;
}

const PAGE = 60;
const MAX_PAGES = 40; // kept in memory
const RELOAD_MS = 1500;
const CAPTION_ROUTE = "/api/v1/datasets/{name}/captions/{path}";

export class Gallery {
  total = $state<number | null>(null);
  unread = $state(0);
  only = $state<ImageFilter>("all");
  sort = $state<ImageSort>("name");
  cropOptions = $state.raw<CropOptions>({ resolution: 1024, resolution_type: "pixel_area", crop: true, crop_aspect: "preserve", crop_style: "center" });
  /** The draft or run whose settings the preview starts with. */
  cropSource = $state("");
  why = $state("");
  /** The image with the keyboard focus, and the focus to set when that card is in the page. */
  active = $state(0);
  moves = $state(0);
  focus = $state.raw<{ at: number; part: CardPart } | null>(null);
  readonly typed = new SvelteMap<string, string>();
  readonly saving = new SvelteMap<string, "saving" | "saved">();
  readonly failed = new SvelteMap<string, string>();
  readonly conflicts = new SvelteMap<string, string | null>();
  edits = $state.raw<Edit[]>([]);
  readonly #pages = new SvelteMap<number, DatasetItem[]>();
  readonly #loadedPages = new Set<number>();
  /** Images that no longer match the filter after an edit but stay in view: file -> index. */
  readonly #filteredOut = new Map<string, number>();
  #generation = 0;
  #range: [number, number] = [0, 0];
  #lastWrite: Promise<unknown> = Promise.resolve();
  #timer = 0;

  constructor(readonly name: string) {}

  item(at: number): DatasetItem | undefined {
    return this.#pages.get(Math.floor(at / PAGE))?.[at % PAGE];
  }

  show(only: ImageFilter): void {
    this.only = only;
    this.active = 0;
    this.total = null;
    this.#pages.clear();
    this.refresh();
  }

  order(sort: ImageSort): void {
    this.sort = sort;
    this.show(this.only);
  }

  /** Leave images out of later runs, or use them again. */
  async exclude(files: string[], excluded: boolean): Promise<void> {
    await api.put("/api/v1/datasets/{name}/exclusions", { path: { name: this.name }, body: { files, excluded } });
    this.refresh();
  }

  /** Use a part of an image in later runs; null uses all of it. */
  async crop(at: number, file: string, box: [number, number, number, number] | null): Promise<void> {
    const args = { path: { name: this.name, path: file }, query: { ...this.cropOptions }, body: { box } };
    const item = (await api.put("/api/v1/datasets/{name}/crop-boxes/{path}", args)).items[0];
    if (item !== undefined) this.#replaceItem(at, item);
  }

  /** Preview the crops of the newest draft with this dataset. */
  async adoptCropOptions(): Promise<void> {
    const drafts = await api.get("/api/v1/drafts");
    const draft = drafts.find(({ datasets }) => datasets.some((set) => set.id === this.name));
    const set = draft?.datasets.find(({ id }) => id === this.name);
    if (draft === undefined || set === undefined) return;
    const given = { ...draft.config, ...Object.fromEntries(Object.entries(set).filter(([, value]) => value !== null)) };
    const options: Record<string, unknown> = { ...this.cropOptions };
    // these are the names and the defaults of a run, which differ from those of the preview
    Object.assign(options, { resolution: 1024, resolution_type: "pixel_area", crop: false, crop_aspect: "square", crop_style: "random" });
    for (const name of Object.keys(options)) if (typeof given[name] === typeof options[name]) options[name] = given[name];
    this.cropSource = draft.name;
    this.setCropOptions(options as unknown as CropOptions);
  }

  setCropOptions(options: CropOptions): void {
    this.cropOptions = options;
    this.refresh();
  }

  /** Load the images in view again; the old ones are shown until then. */
  refresh(): void {
    this.#generation += 1;
    this.#loadedPages.clear();
    this.#filteredOut.clear();
    this.loadRange(...this.#range);
  }

  close(): void {
    this.#generation += 1;
    clearTimeout(this.#timer);
  }

  loadRange(first: number, last: number): void {
    this.#range = [first, last];
    for (let page = Math.floor(first / PAGE); page <= Math.floor(Math.max(0, last) / PAGE); page++) {
      if (!this.#loadedPages.has(page)) void this.#load(page);
    }
  }

  async #load(page: number): Promise<void> {
    const generation = this.#generation;
    this.#loadedPages.add(page);
    const hidden = [...this.#filteredOut.values()].filter((at) => at < page * PAGE).length;
    const query = { offset: page * PAGE - hidden, limit: PAGE, only: this.only, sort: this.sort, ...this.cropOptions };
    try {
      const loaded: DatasetItemPage & { unread?: number } = await api.get("/api/v1/datasets/{name}/items", { path: { name: this.name }, query });
      if (generation !== this.#generation) return;
      this.#pages.set(page, loaded.items);
      this.total = loaded.total + this.#filteredOut.size;
      this.why = "";
      this.#evictPages(page);
      this.#reloadWhileUnread(loaded.unread ?? 0);
    } catch (error) {
      if (generation !== this.#generation) return;
      this.#loadedPages.delete(page);
      this.total ??= 0;
      this.why = explain(error);
    }
  }

  #evictPages(current: number): void {
    for (const page of this.#pages.keys()) {
      if (this.#pages.size <= MAX_PAGES) return;
      if (Math.abs(page - current) > MAX_PAGES / 2) {
        this.#pages.delete(page);
        this.#loadedPages.delete(page);
      }
    }
  }

  /** Load again while the server is still reading the folder. */
  #reloadWhileUnread(unread: number): void {
    this.unread = unread;
    clearTimeout(this.#timer);
    if (unread > 0) this.#timer = window.setTimeout(() => this.refresh(), RELOAD_MS);
  }

  edit(at: number, text: string): void {
    const item = this.item(at);
    this.typed.delete(item?.file ?? "");
    if (item === undefined || text === (item.caption_text ?? "")) return;
    void this.#write(at, item.file, text, item.caption_text, true);
  }

  /** Undo the last edit, after waiting for an edit that is still being saved. */
  async undo(): Promise<void> {
    await this.#lastWrite;
    const last = this.edits.at(-1);
    if (last === undefined) return;
    this.edits = this.edits.slice(0, -1);
    const done = await this.#write(last.at, last.file, last.before ?? "", last.after, false);
    if (done) toasts.success(fill(i18n.t.datasets.undoDone, { file: last.file }));
  }

  /** Write one caption after the other, so that an undo follows the edit that it undoes. */
  #write(at: number, file: string, text: string, before: string | null, remember: boolean): Promise<boolean> {
    const done = this.#lastWrite.then(() => this.#send(at, file, text, before, remember));
    this.#lastWrite = done;
    return done;
  }

  async #send(at: number, file: string, text: string, before: string | null, remember: boolean): Promise<boolean> {
    this.saving.set(file, "saving");
    this.failed.delete(file);
    try {
      const args = { path: { name: this.name, path: file }, query: { ...this.cropOptions }, body: { text, before } };
      const item = (await api.put(CAPTION_ROUTE, args)).items[0];
      if (item !== undefined) this.#replaceItem(at, item);
      if (remember) this.edits = [...this.edits, { at, file, before, after: item?.caption_text ?? null }];
      this.conflicts.delete(file);
      this.saving.set(file, "saved");
      return true;
    } catch (error) {
      this.saving.delete(file);
      this.failed.set(file, explain(error));
      if (remember) this.typed.set(file, text);
      if (error instanceof ApiError && error.status === 409) await this.#showConflict(at, file, text);
      return false;
    }
  }

  #replaceItem(at: number, item: DatasetItem): void {
    const page = this.#pages.get(Math.floor(at / PAGE));
    if (page?.[at % PAGE]?.file !== item.file) return this.refresh();
    this.#pages.set(Math.floor(at / PAGE), page.with(at % PAGE, item));
    const captioned = item.captions.length > 0;
    const matches = !["captioned", "uncaptioned"].includes(this.only) || captioned === (this.only === "captioned");
    if (matches) this.#filteredOut.delete(item.file);
    else this.#filteredOut.set(item.file, at);
  }

  /** Show the present caption of the file next to the text that could not be written. */
  async #showConflict(at: number, file: string, text: string): Promise<void> {
    const query = { offset: at, limit: 1, only: this.only, sort: this.sort, ...this.cropOptions };
    const item = (await api.get("/api/v1/datasets/{name}/items", { path: { name: this.name }, query })).items[0];
    if (item === undefined || item.file !== file) return this.refresh();
    this.#replaceItem(at, item);
    this.typed.set(file, text);
    this.conflicts.set(file, item.caption_text);
    this.failed.delete(file);
  }

  /** End a conflict with the user's text or with that of the file. */
  resolveConflict(at: number, file: string, mine: boolean): void {
    const text = this.typed.get(file) ?? "";
    this.typed.delete(file);
    this.conflicts.delete(file);
    if (mine) this.edit(at, text);
  }

  /** Save captions that are being typed when the page is closed. */
  saveOnLeave(): void {
    for (const [file, text] of this.typed) {
      const item = [...this.#pages.values()].flat().find((candidate) => candidate.file === file);
      if (item === undefined || text === (item.caption_text ?? "") || this.conflicts.has(file)) continue;
      void fetch(url(CAPTION_ROUTE, { name: this.name, path: file }), {
        method: "PUT",
        keepalive: true,
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ text, before: item.caption_text }),
      });
    }
  }

  /** Move the focus to an image or its caption. */
  move(to: number, part: CardPart): void {
    const at = Math.max(0, Math.min((this.total ?? 1) - 1, to));
    this.active = at;
    this.moves += 1;
    this.focus = { at, part };
  }
}
