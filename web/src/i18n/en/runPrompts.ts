/** The editor of a run's validation prompts. */
export const runPrompts = {
  title: "Validation prompts",
  help: "Changes are used from the next validation on, and also after a resume. Images of earlier steps stay.",
  save: "Use from the next validation on",
  discard: "Discard the changes",
  saved: "The prompts are used from the next validation on.",
  pending: "Waiting for the next validation.",
  none: "A run that generates images needs at least one prompt.",
};
