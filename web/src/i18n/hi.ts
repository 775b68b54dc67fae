import type { Texts } from "../lib/i18n.svelte";
import { common } from "./hi/common";
import { datasets } from "./hi/datasets";
import { errors } from "./hi/errors";
import { nav } from "./hi/nav";
import { newRun } from "./hi/newRun";
import { run } from "./hi/run";
import { runs } from "./hi/runs";
import { system } from "./hi/system";

export const hi: Texts = { common, datasets, errors, nav, newRun, run, runs, system };
