// Adds paths to the table of the newest ones as they become valid, and removes those that are collected.
// Without JavaScript, or if /events is refused, the table stays as it was.
const table = document.getElementById("newest");
const live = document.getElementById("live");
const body = table.tBodies[0];
const most = Number(table.dataset.most);

const size = (bytes) => {
  if (bytes < 1024) return bytes === 1 ? "1 byte" : `${bytes} bytes`;
  const power = Math.min(Math.floor(Math.log2(bytes) / 10), 4);
  const digits = { minimumFractionDigits: 1, maximumFractionDigits: 1 };
  return `${(bytes / 1024 ** power).toLocaleString("en", digits)} ${" KMGT"[power]}iB`;
};

const remove = (hash) => {
  for (const row of body.querySelectorAll("tr")) if (row.dataset.hash === hash) row.remove();
};

const add = (hash, name, bytes) => {
  const row = body.insertRow(0);
  row.dataset.hash = hash;
  const link = document.createElement("a");
  link.href = "path/" + hash;
  link.textContent = name;
  const hashPart = document.createElement("span");
  hashPart.className = "hash";
  hashPart.textContent = hash;
  const cell = row.insertCell();
  cell.className = "path";
  cell.append(link, " ", hashPart);
  const now = new Date().toISOString().slice(0, 16).replace("T", " ") + " UTC";
  for (const [text, style] of [[size(bytes), "size"], [now, "size date"]]) {
    const other = row.insertCell();
    other.className = style;
    other.textContent = text;
  }
  while (body.rows.length > most) body.lastElementChild.remove();
};

const parts = (event) => {
  const base = JSON.parse(event.data).path.split("/").pop();
  return [base.slice(0, 32), base.slice(33)];
};

const events = new EventSource("events?event=valid&event=collected");
events.onopen = () => { live.textContent = "New paths appear here as they become valid."; };
events.onerror = () => { live.textContent = ""; };
events.addEventListener("valid", (event) => {
  const [hash, name] = parts(event);
  if (name.endsWith(".drv")) return;
  remove(hash);
  add(hash, name, JSON.parse(event.data).narSize);
});
events.addEventListener("collected", (event) => remove(parts(event)[0]));
events.addEventListener("gap", () => location.reload());
