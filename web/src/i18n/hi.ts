import type { Texts } from "../lib/i18n.svelte";
import { common } from "./hi/common";
import { compare } from "./hi/compare";
import { datasets } from "./hi/datasets";
import { errors } from "./hi/errors";
import { firstVisit } from "./hi/firstVisit";
import { nav } from "./hi/nav";
import { newRun } from "./hi/newRun";
import { playground } from "./hi/playground";
import { run } from "./hi/run";
import { runPrompts } from "./hi/runPrompts";
import { runs } from "./hi/runs";
import { settings } from "./hi/settings";
import { statistics } from "./hi/statistics";
import { system } from "./hi/system";
import { usage } from "./hi/usage";
import { verdict } from "./hi/verdict";

export const hi: Texts = { common, settings, compare, datasets, errors, firstVisit, nav, newRun, playground, run, runPrompts, runs, statistics, system, usage, verdict };
