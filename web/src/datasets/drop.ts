/** Files of a drop or of a file dialog, with their folders. */

export interface Found {
  path: string;
  file: File;
}
const TAKEN = /\.(png|jpe?g|jpe|jfif|webp|avif|bmp|tiff?|txt|zip)$/i;
const LITTER = /(^|\/)(\.|__MACOSX\/|Thumbs\.db$|desktop\.ini$)/i;

export function isTaken(path: string): boolean {
  return TAKEN.test(path) && !LITTER.test(path);
}

/** Folders are looked into. The entries must be taken before the first wait: the drop is empty afterwards. */
export async function dropped(transfer: DataTransfer): Promise<Found[]> {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
  const found: Found[] = [];
  for (const entry of entries) {
    // one folder alone is the dataset itself
    if (entries.length === 1 && entry.isDirectory) for (const inner of await list(entry)) await walk(inner, "", found);
    else await walk(entry, "", found);
  }
  return found;
}

export function chosen(files: FileList): Found[] {
  return [...files].map((file) => ({ file, path: file.webkitRelativePath.split("/").slice(1).join("/") || file.name }));
}

async function walk(entry: FileSystemEntry, folder: string, found: Found[]): Promise<void> {
  const path = folder + entry.name;
  if (entry.isFile) found.push({ path, file: await fileOf(entry as FileSystemFileEntry) });
  else for (const inner of await list(entry)) await walk(inner, `${path}/`, found);
}

function fileOf(entry: FileSystemFileEntry): Promise<File> {
  return new Promise((done, fail) => entry.file(done, fail));
}

/** A reader tells a hundred at a time. */
async function list(entry: FileSystemEntry): Promise<FileSystemEntry[]> {
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  const all: FileSystemEntry[] = [];
  for (;;) {
    const some = await new Promise<FileSystemEntry[]>((done, fail) => reader.readEntries(done, fail));
    if (some.length === 0) return all;
    all.push(...some);
  }
}
