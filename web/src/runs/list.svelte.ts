/** The page of the list of runs that is shown. Its filter and place stay while other pages are open. */
import { api } from "../lib/api";
import type { paths, RunPage, RunSummary } from "../lib/types";

export const PAGE = 50; // rows of a page
const READ_AGAIN_MS = 2000; // while the server still reads events of runs that are shown
type RunQuery = NonNullable<paths["/api/v1/runs"]["get"]["parameters"]["query"]>;
export type ListFilter = Required<Pick<RunQuery, "words" | "state" | "archived" | "sort">>;

class RunList {
  filter = $state<ListFilter>({ words: "", state: "any", archived: false, sort: "newest" });
  offset = $state(0);
  page = $state.raw<RunPage | null>(null);
  #asked = 0;

  /** Read the page again. An answer that was overtaken by a later request is dropped. */
  async load(): Promise<void> {
    const asked = ++this.#asked;
    const query = { ...this.filter, offset: this.offset, limit: PAGE, queued: false };
    const page = await api.get("/api/v1/runs", { query });
    if (asked !== this.#asked) return;
    this.page = page;
    if (page.unread) setTimeout(() => asked === this.#asked && void this.load(), READ_AGAIN_MS);
    if (page.runs.length === 0 && page.total > 0) this.offset = Math.floor((page.total - 1) / PAGE) * PAGE;
  }

  /** Take over changes of runs that are shown; returns true if the page must be read again. */
  apply(changed: RunSummary[], removed: string[]): boolean {
    const page = this.page;
    if (page === null) return true;
    const now = new Map(changed.map((run) => [run.id, run]));
    const moved = changed.some((run) => {
      const before = page.runs.find((row) => row.id === run.id);
      return before === undefined || before.state !== run.state || before.archived !== run.archived || before.name !== run.name;
    });
    if (page.runs.some((run) => now.has(run.id))) this.page = { ...page, runs: page.runs.map((run) => now.get(run.id) ?? run) };
    return moved || removed.length > 0;
  }
}

export const runList = new RunList();
