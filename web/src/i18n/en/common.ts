import type { RunSummary } from "../../lib/types";

const states: Record<RunSummary["state"], string> = {
  draft: "Draft",
  queued: "Queued",
  starting: "Starting",
  caching: "Preparing",
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
  save: "Save",
  download: "Download",
  loading: "Loading…",
  none: "none",
  yes: "yes",
  no: "no",
  login: {
    title: "Enter the token",
    text: "This server can be reached from other machines, so it asks who you are. The token was printed in its terminal when it started.",
    token: "Token",
    enter: "Enter",
  },
};
