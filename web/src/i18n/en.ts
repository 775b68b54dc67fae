import { common } from "./en/common";
import { datasets } from "./en/datasets";
import { errors } from "./en/errors";
import { nav } from "./en/nav";
import { newRun } from "./en/newRun";
import { run } from "./en/run";
import { runs } from "./en/runs";
import { system } from "./en/system";

export const en = { common, datasets, errors, nav, newRun, run, runs, system };
