import { common } from "./en/common";
import { compare } from "./en/compare";
import { datasets } from "./en/datasets";
import { errors } from "./en/errors";
import { firstVisit } from "./en/firstVisit";
import { nav } from "./en/nav";
import { newRun } from "./en/newRun";
import { playground } from "./en/playground";
import { run } from "./en/run";
import { runPrompts } from "./en/runPrompts";
import { runs } from "./en/runs";
import { settings } from "./en/settings";
import { statistics } from "./en/statistics";
import { system } from "./en/system";
import { usage } from "./en/usage";
import { verdict } from "./en/verdict";

export const en = { common, settings, compare, datasets, errors, firstVisit, nav, newRun, playground, run, runPrompts, runs, statistics, system, usage, verdict };
