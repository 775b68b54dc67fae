/** Whether a run generates validation images. */

const SOURCES = ["validation_prompt", "user_prompt_library", "validation_prompt_library"];

/** config: the run's; null if it is not known yet. */
export function hasPrompts(config: Record<string, unknown> | null): boolean {
  return config === null || (!config.validation_disable && SOURCES.some((name) => Boolean(config[name])));
}
