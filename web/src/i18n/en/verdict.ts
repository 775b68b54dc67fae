/** The verdict on the held-out losses, and the history of resumes. */
export const verdict = {
  titles: {
    learning: "Still learning",
    flat: "No longer improving",
    notLearning: "Not learning",
    risen: "Not learning",
    overfitting: "Overfitting",
    overfittingSaved: "Overfitting",
    unknown: "Too few measurements",
  },
  texts: {
    learning: "The held-out loss changed by {change} since step {since} (as of step {step}). More steps should help (max_train_steps).",
    flat: "From step {since} to step {step} the held-out loss changed by {change}. Steps after {since} have no measurable effect: train that many, or stop with early_stopping.",
    notLearning: "The held-out loss changed by {change} since step 0 (as of step {step}). If the images do not change either, raise learning_rate (`simpletuner tune` finds a rate) or check the captions.",
    risen: "The held-out loss rose by {change} since step 0 (as of step {step}). Lower learning_rate (`simpletuner tune` finds a rate).",
    overfitting: "The held-out loss rose by {change} from step {since} to step {step}. The step with the lowest loss, {best}, has no checkpoint: train {best} steps. More images, a lower learning_rate or a lower lora_rank move that point.",
    overfittingSaved: "The held-out loss rose by {change} from step {since} to step {step}. Use {checkpoint}, which has the lowest loss. More images, a lower learning_rate or a lower lora_rank move that point.",
    unknown: "At step {step} there are too few measurements of the held-out loss to say whether the run still learns. A lower eval_steps_interval gives more.",
  },
  paired: "Compared in pairs on {samples} held-out {samples|image|images}; ± is one standard error.",
  resumes: {
    title: "Resumes",
    time: "Time",
    checkpoint: "Checkpoint",
    step: "From step",
    repeated: "Repeated steps",
  },
};
