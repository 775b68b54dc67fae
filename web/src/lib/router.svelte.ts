/** The address of the page: "#/runs/ab12?x=1" has page "runs" and rest ["ab12"]. */

class Router {
  #hash = $state(location.hash);
  readonly #route = $derived.by(() => {
    const [path = "", query = ""] = this.#hash.replace(/^#\/?/, "").split("?", 2);
    const [page = "", ...rest] = path.split("/").map(decodeURIComponent);
    return { page: page || "runs", rest, query: new URLSearchParams(query) };
  });

  constructor() {
    addEventListener("hashchange", () => {
      this.#hash = location.hash;
    });
  }

  get page(): string {
    return this.#route.page;
  }

  get rest(): string[] {
    return this.#route.rest;
  }

  /** What follows `page` in the address. Nothing while another page, which replaces it, is loaded. */
  restOf(page: string): string[] {
    return this.page === page ? this.rest : [];
  }

  get query(): URLSearchParams {
    return this.#route.query;
  }

  /** Open a page, such as go("runs", id), with a new entry in the history. */
  go(...parts: string[]): void {
    location.hash = href(...parts);
  }

  /** Change the address without a new entry in the history. */
  replace(...parts: string[]): void {
    history.replaceState(null, "", href(...parts));
    this.#hash = location.hash;
  }
}

export function href(...parts: string[]): string {
  return "#/" + parts.map(encodeURIComponent).join("/");
}

export const router = new Router();
