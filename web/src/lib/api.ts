/** The server's routes with their types: `api.get("/api/v1/runs/{id}", { path: { id } })`. */
import { i18n } from "./i18n.svelte";
import type { ErrorDetail, paths } from "./types";

type Method = "get" | "post" | "put" | "delete";
type Operation = { responses: Record<number, unknown> };
type Route<M extends Method> = {
  [P in keyof paths]: paths[P][M] extends Operation ? P : never;
}[keyof paths];
type Op<P extends keyof paths, M extends Method> = Extract<paths[P][M], Operation>;

type ParametersIn<O, K extends string> = O extends { parameters: infer Q }
  ? Q extends { [X in K]: infer T }
    ? { [X in K]: T }
    : Q extends { [X in K]?: infer T }
      ? { [X in K]?: T }
      : unknown
  : unknown;
type Body<O> = O extends { requestBody: { content: { "application/json": infer B } } } ? { body: B } : unknown;
type RequestArguments<O> = ParametersIn<O, "path"> & ParametersIn<O, "query"> & Body<O>;
/** The arguments are optional if none of them is required. */
type Optional<A> = Record<never, never> extends A ? [args?: A] : [args: A];

type Json<R> = R extends { content: { "application/json": infer B } } ? B : undefined;
type ResponseBody<O> = O extends { responses: infer R }
  ? R extends { 200: infer A }
    ? Json<A>
    : R extends { 201: infer A }
      ? Json<A>
      : undefined
  : never;

/** An error response. status 0: the server could not be reached. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly detail: ErrorDetail[],
  ) {
    super(detail.map((item) => (item.loc ? `${item.loc}: ${item.message}` : item.message)).join("\n"));
  }
}

/** True if the same request may succeed later. */
export function isUnreachable(error: unknown): boolean {
  return error instanceof ApiError && error.status === 0;
}

interface UntypedArguments {
  path?: Record<string, unknown>;
  query?: Record<string, unknown>;
  body?: unknown;
}

/** The URL of a route, also for images and downloads. The parameter "path" keeps its slashes. */
export function url(route: keyof paths, path: object = {}, query: object = {}): string {
  const values = path as Record<string, unknown>;
  const filled = route.slice(1).replace(/\{(\w+)\}/g, (_, name: string) => {
    const value = String(values[name]);
    return name === "path" ? value.split("/").map(encodeURIComponent).join("/") : encodeURIComponent(value);
  });
  const address = new URL(filled, document.baseURI);
  for (const [name, value] of Object.entries(query)) {
    for (const one of Array.isArray(value) ? (value as unknown[]) : [value]) {
      if (one !== undefined && one !== null) address.searchParams.append(name, String(one));
    }
  }
  return address.pathname + address.search;
}

/** Convert an error response; a 401 opens the login page. */
export async function toApiError(response: Response): Promise<ApiError> {
  let detail: ErrorDetail[] = [];
  try {
    const body: unknown = await response.json();
    if (typeof body === "object" && body !== null && "detail" in body && Array.isArray(body.detail)) {
      detail = body.detail as ErrorDetail[];
    }
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error; // the error page of a proxy is not JSON
  }
  if (response.status === 401 && !location.hash.startsWith("#/login")) location.hash = "#/login";
  return new ApiError(response.status, detail);
}

async function call(method: Method, route: keyof paths, args: UntypedArguments): Promise<unknown> {
  const headers: Record<string, string> = { "accept-language": i18n.language };
  if (method !== "get") headers["content-type"] = "application/json";
  const init: RequestInit = { method: method.toUpperCase(), credentials: "same-origin", headers };
  if (args.body !== undefined) init.body = JSON.stringify(args.body);
  try {
    const response = await fetch(url(route, args.path, args.query), init);
    if (!response.ok) throw await toApiError(response);
    return response.status === 204 ? undefined : await response.json();
  } catch (error) {
    if (error instanceof ApiError) throw error;
    throw new ApiError(0, []); // also for a response that was interrupted
  }
}

/** The arguments without the types of their route, which together would be too large a union for the compiler. */
function first(args: readonly unknown[]): UntypedArguments {
  return (args[0] ?? {}) as UntypedArguments;
}

export const api = {
  get: <P extends Route<"get">>(route: P, ...args: Optional<RequestArguments<Op<P, "get">>>) =>
    call("get", route, first(args)) as Promise<ResponseBody<Op<P, "get">>>,
  post: <P extends Route<"post">>(route: P, ...args: Optional<RequestArguments<Op<P, "post">>>) =>
    call("post", route, first(args)) as Promise<ResponseBody<Op<P, "post">>>,
  put: <P extends Route<"put">>(route: P, ...args: Optional<RequestArguments<Op<P, "put">>>) =>
    call("put", route, first(args)) as Promise<ResponseBody<Op<P, "put">>>,
  delete: <P extends Route<"delete">>(route: P, ...args: Optional<RequestArguments<Op<P, "delete">>>) =>
    call("delete", route, first(args)) as Promise<ResponseBody<Op<P, "delete">>>,
};
