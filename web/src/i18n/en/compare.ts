export const compare = {
  title: "Compare runs",
  perMinute: "by minutes of training",
  heldOut: "Held-out loss",
  heldOutChange: "Change of the held-out loss",
  settings: "Differing settings",
  noDifference: "These runs have the same settings.",
  scores: "Held-out loss and scores, with their standard error",
  score: "Score",
  images: "Same prompts",
  noImages: "No prompt in common",
  noImagesHelp: "Runs are shown side by side where they have validation images of the same prompt, size and seed.",
};
