/** Light or dark: the system's, or the person's choice. */

export type Theme = "system" | "light" | "dark";
const KEPT = "simpletuner.theme";
const system = matchMedia("(prefers-color-scheme: dark)");

function first(): Theme {
  const kept = localStorage.getItem(KEPT);
  return kept === "light" || kept === "dark" ? kept : "system";
}

class Themes {
  #choice = $state<Theme>(first());
  #systemDark = $state(system.matches);

  constructor() {
    this.#show();
    system.addEventListener("change", () => {
      this.#systemDark = system.matches;
    });
  }

  get choice(): Theme {
    return this.#choice;
  }

  set choice(chosen: Theme) {
    this.#choice = chosen;
    localStorage.setItem(KEPT, chosen);
    this.#show();
  }

  /** For what cannot follow CSS by itself: charts read their colours again when this changes. */
  get dark(): boolean {
    return this.#choice === "dark" || (this.#choice === "system" && this.#systemDark);
  }

  #show(): void {
    document.documentElement.dataset.theme = this.#choice;
  }
}

export const theme = new Themes();
