export const nav = {
  label: "Pages",
  skip: "Skip to content",
  runs: "Runs",
  newRun: "New run",
  datasets: "Datasets",
  system: "System",
  language: "Language",
  theme: "Theme",
  themes: { system: "System", light: "Light", dark: "Dark" },
  connected: "Live",
  connecting: "Connecting…",
  lost: "No connection",
};
