import type { RunSummary } from "../../lib/types";

const states: Record<RunSummary["state"], string> = {
  draft: "Draft",
  queued: "Queued",
  starting: "Starting",
  caching: "Caching",
  running: "Running",
  stopping: "Stopping",
  stopped: "Stopped",
  failed: "Failed",
  done: "Done",
  lost: "Interrupted",
};

export const common = {
  states,
  close: "Close",
  cancel: "Cancel",
  download: "Download",
  loading: "Loading…",
  login: {
    title: "Log in",
    text: "Other machines can reach this server, so it requires a token. The token was printed in the server's terminal when it started.",
    token: "Token",
    enter: "Log in",
  },
  pager: { label: "Pages", previous: "Previous", next: "Next", range: "{from} to {to} of {total}" },
  trash: {
    deleted: "{name} was moved to the trash.",
    restored: "{name} was restored.",
    several: "{n} items",
    undo: "Undo",
  },
  preview: "Rough preview of what is being sampled",
};
