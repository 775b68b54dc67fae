/** Charts of the load of the machine. */
export const usage = {
  title: "Load of this machine",
  cpu: "CPU",
  memory: "Memory in use",
  disk: "Disk reads and writes",
  read: "Read",
  write: "Written",
  diskFree: "Free on the disk of the workspace",
  load: "GPU load",
  temperature: "Temperature",
  power: "Power",
  minutes: "Minutes",
  none: "Nothing was recorded in that time. The server records while a job runs or this page is open.",
};
