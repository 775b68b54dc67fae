/** Notifications of the browser when a run ends, if the user has switched them on. */
import { i18n } from "./i18n.svelte";
import type { RunSummary } from "./types";

const STORAGE_KEY = "simpletuner.notifications";
const ACTIVE: RunSummary["state"][] = ["starting", "caching", "running", "stopping"];

class Notifications {
  #enabled = $state(localStorage.getItem(STORAGE_KEY) === "on");

  get supported(): boolean {
    return "Notification" in window;
  }

  get enabled(): boolean {
    return this.#enabled && this.supported && Notification.permission === "granted";
  }

  /** Switch them on or off; the browser asks for the permission. Returns false if it was refused. */
  async set(enabled: boolean): Promise<boolean> {
    const granted = !enabled || (this.supported && (await Notification.requestPermission()) === "granted");
    this.#enabled = enabled && granted;
    localStorage.setItem(STORAGE_KEY, this.#enabled ? "on" : "off");
    return granted;
  }
}

export const notifications = new Notifications();

/** Notify of each run that was active before and has ended now. */
export function notifyOfEnds(before: RunSummary[], changed: RunSummary[]): void {
  if (!notifications.enabled) return;
  const states = new Map(before.map((run) => [run.id, run.state]));
  for (const run of changed) {
    const old = states.get(run.id);
    if (old === undefined || !ACTIVE.includes(old) || ACTIVE.includes(run.state) || run.state === "queued") continue;
    new Notification(`${run.name}: ${i18n.t.common.states[run.state]}`, { body: run.message, tag: run.id });
  }
}
