/** Files with their folders, from a drop or a file dialog. */

export interface UploadFile {
  path: string;
  file: File;
}
const SUPPORTED = /\.(png|jpe?g|jpe|jfif|webp|avif|bmp|tiff?|txt|zip)$/i;
const IGNORED = /(^|\/)(\.|__MACOSX\/|Thumbs\.db$|desktop\.ini$)/i;

export function isSupported(path: string): boolean {
  return SUPPORTED.test(path) && !IGNORED.test(path);
}

/** Return the files of a drop and of its folders.
 * The entries are read before the first await, because the browser empties the drop afterwards. */
export async function filesFromDrop(transfer: DataTransfer): Promise<UploadFile[]> {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
  const files: UploadFile[] = [];
  for (const entry of entries) {
    // a single folder is the dataset itself, so its name is not part of the paths
    if (entries.length === 1 && entry.isDirectory) for (const inner of await list(entry)) await walk(inner, "", files);
    else await walk(entry, "", files);
  }
  return files;
}

export function filesFromInput(list: FileList): UploadFile[] {
  return [...list].map((file) => ({ file, path: file.webkitRelativePath.split("/").slice(1).join("/") || file.name }));
}

async function walk(entry: FileSystemEntry, folder: string, files: UploadFile[]): Promise<void> {
  const path = folder + entry.name;
  if (entry.isFile) files.push({ path, file: await readFile(entry as FileSystemFileEntry) });
  else for (const inner of await list(entry)) await walk(inner, `${path}/`, files);
}

function readFile(entry: FileSystemFileEntry): Promise<File> {
  return new Promise((done, fail) => entry.file(done, fail));
}

/** List a folder; the reader returns at most a hundred entries per call. */
async function list(entry: FileSystemEntry): Promise<FileSystemEntry[]> {
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  const all: FileSystemEntry[] = [];
  for (;;) {
    const batch = await new Promise<FileSystemEntry[]>((done, fail) => reader.readEntries(done, fail));
    if (batch.length === 0) return all;
    all.push(...batch);
  }
}
