import type { Texts } from "../lib/i18n.svelte";
import { common } from "./es/common";
import { compare } from "./es/compare";
import { datasets } from "./es/datasets";
import { errors } from "./es/errors";
import { firstVisit } from "./es/firstVisit";
import { nav } from "./es/nav";
import { newRun } from "./es/newRun";
import { playground } from "./es/playground";
import { run } from "./es/run";
import { runPrompts } from "./es/runPrompts";
import { runs } from "./es/runs";
import { settings } from "./es/settings";
import { statistics } from "./es/statistics";
import { system } from "./es/system";
import { usage } from "./es/usage";
import { verdict } from "./es/verdict";

export const es: Texts = { common, settings, compare, datasets, errors, firstVisit, nav, newRun, playground, run, runPrompts, runs, statistics, system, usage, verdict };
