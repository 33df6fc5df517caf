"use strict";
// Sorting of tables, and the explorer. Every number shown was computed before; nothing is here.

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row, place) => [key(row.cells[column]), place, row]);
      rows.sort((a, b) => (down ? compare(b[0], a[0]) : compare(a[0], b[0])) || a[1] - b[1]);
      body.append(...rows.map((entry) => entry[2]));
    });
  });
}

function key(cell) {
  const text = cell.dataset.value ?? cell.textContent.trim();
  const number = Number(text.replaceAll(",", ""));
  return text !== "" && Number.isFinite(number) ? number : text;
}

function compare(a, b) {
  if (typeof a === typeof b) {
    return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  }
  return typeof a === "number" ? -1 : 1;  // numbers before words
}

function explorer(data) {
  const find = (id) => document.getElementById(id);
  const body = find("samples").tBodies[0];
  const words = { c: "certified", r: "refuted", u: "unknown" };
  const exact = data.unit === "stored levels";
  let current = null;

  for (const sample of data.samples) {
    const row = body.insertRow();
    row.dataset.index = sample.index;
    const head = document.createElement("th");
    head.scope = "row";
    head.dataset.value = sample.index;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = sample.index;
    button.setAttribute("aria-label", `Show sample ${sample.index}`);
    button.addEventListener("click", () => show(sample));
    head.append(button);
    row.append(head);
    cell(row, sample.label);
    cell(row, sample.prediction);
    cell(row, sample.verdict).className = sample.verdict;
    cell(row, sample.certified < 0 ? "none" : short(sample.certified)).dataset.value =
      sample.certified;
  }
  const classes = [...new Set(data.samples.map((sample) => sample.label))].sort((a, b) => a - b);
  for (const label of classes) {
    find("filter-class").add(new Option(label, label));
  }

  function cell(row, text) {
    const made = row.insertCell();
    made.textContent = text;
    return made;
  }

  function short(value) {
    return exact ? String(value) : String(Number(value.toPrecision(6)));
  }

  function filter() {
    const verdict = find("filter-verdict").value;
    const label = find("filter-class").value;
    const index = find("filter-index").value.trim();
    let count = 0;
    for (const row of body.rows) {
      const sample = byIndex.get(Number(row.dataset.index));
      row.hidden = (verdict !== "" && sample.verdict !== verdict)
        || (label !== "" && String(sample.label) !== label)
        || (index !== "" && String(sample.index) !== index);
      count += row.hidden ? 0 : 1;
    }
    const total = data.samples.length;
    find("count").textContent = `${count} of ${total} ${total === 1 ? "sample" : "samples"} shown`;
    if (index !== "" && count === 1 && byIndex.has(Number(index))) {
      show(byIndex.get(Number(index)));
    }
  }

  function show(sample) {
    current = sample;
    for (const row of body.rows) {
      row.setAttribute("aria-current", String(Number(row.dataset.index) === sample.index));
    }
    find("shown").textContent = `Sample ${sample.index}, label ${sample.label}`;
    draw(find("image"), sample.image);
    find("image").setAttribute("aria-label", `Sample ${sample.index} of class ${sample.label}`);
    for (const figure of document.querySelectorAll(".broken")) {
      figure.hidden = sample.counterexample === "";
    }
    if (sample.counterexample !== "") {
      draw(find("counterexample"), sample.counterexample);
      const [before, after] = [bytesOf(sample.image), bytesOf(sample.counterexample)];
      const middle = data.levels / 2;
      paint(find("difference"), before.map((byte, at) =>
        Math.round(middle + (middle * (after[at] - byte)) / sample.distance)));
      find("broken-text").textContent = `counterexample, ${sample.distance} `
        + `${sample.distance === 1 ? "level" : "levels"} away: `
        + `class ${winner(sample.wrong)} under ${sample.profile}`;
      find("counterexample").setAttribute(
        "aria-label", `Counterexample to sample ${sample.index}, of class ${winner(sample.wrong)}`);
    }
    find("facts").textContent = facts(sample);
    step();
  }

  function facts(sample) {
    const parts = [`decided as ${sample.prediction}`, `${sample.verdict} (${sample.method})`];
    if (sample.message !== "") parts.push(sample.message);
    if (sample.verdict === "refuted" && sample.counterexample === "") {
      parts.push("misclassified as it is");
    }
    if (sample.certified >= 0) {
      const least = exact ? "certified radius" : "largest of the radii that is certified:";
      parts.push(`${least} ${short(sample.certified)} ${data.unit}`);
    } else {
      parts.push("certified at none of the radii");
    }
    return parts.join("; ");
  }

  function winner(logits) {
    return logits.indexOf(Math.max(...logits));
  }

  function step() {
    const at = Number(find("radius").value);
    const { exact: text, value } = data.radii[at];
    const word = words[current.verdicts[at]];
    const own = at === data.own ? ", the certificate's" : "";
    const rounded = text === String(value) ? "" : ` (${short(value)})`;
    const status = find("radius-text");
    const bold = document.createElement("b");
    bold.className = word;
    bold.textContent = word;
    status.replaceChildren(`${text}${rounded} ${data.unit}${own}: `, bold);
    find("radius").setAttribute("aria-valuetext", `${text}, ${word}`);
    bars(current.lower[at], current.upper[at]);
  }

  function bars(lower, upper) {
    const rows = find("bounds").tBodies[0];
    rows.replaceChildren();
    const most = 12;
    let shown = [...lower.keys()];
    if (shown.length > most) {
      const rivals = shown.filter((label) => label !== current.label);
      rivals.sort((a, b) => upper[b] - upper[a]);
      shown = [current.label, ...rivals.slice(0, most - 1)].sort((a, b) => a - b);
    }
    const least = Math.min(...current.lower.flat());
    const greatest = Math.max(...current.upper.flat());
    const place = (value) => (100 * (value - least)) / Math.max(1, greatest - least);
    for (const label of shown) {
      const row = rows.insertRow();
      if (label === current.label) row.className = "own";
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = label === current.label ? `${label} (label)` : label;
      row.append(head);
      const track = document.createElement("div");
      track.className = "track";
      const bar = document.createElement("i");
      bar.style.left = `${place(lower[label])}%`;
      bar.style.width = `${place(upper[label]) - place(lower[label])}%`;
      const mark = document.createElement("u");
      mark.style.left = `min(${place(current.logits[label])}%, 100% - 2px)`;
      track.append(bar, mark);
      row.insertCell().append(track);
      for (const value of [lower[label], upper[label], current.logits[label]]) {
        cell(row, value);
      }
    }
  }

  function bytesOf(encoded) {
    return Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
  }

  function draw(canvas, encoded) {
    paint(canvas, bytesOf(encoded));
  }

  function paint(canvas, bytes) {
    const picture = data.shape.length === 3 && (data.shape[2] === 1 || data.shape[2] === 3);
    if (!picture) return columns(canvas, bytes);
    const [height, width, channels] = data.shape;
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    for (let pixel = 0; pixel < width * height; pixel += 1) {
      for (let channel = 0; channel < 3; channel += 1) {
        image.data[4 * pixel + channel] = bytes[channels * pixel + (channel % channels)];
      }
      image.data[4 * pixel + 3] = 255;
    }
    context.putImageData(image, 0, 0);
  }

  // What is no picture is drawn as a column for each element.
  function columns(canvas, bytes) {
    canvas.width = bytes.length;
    canvas.height = 96;
    const context = canvas.getContext("2d");
    context.fillStyle = "#808790";
    bytes.forEach((byte, at) => {
      const height = (96 * byte) / data.levels;
      context.fillRect(at, 96 - height, 1, height);
    });
  }

  const byIndex = new Map(data.samples.map((sample) => [sample.index, sample]));
  find("filters").addEventListener("input", filter);
  find("filters").addEventListener("submit", (event) => event.preventDefault());
  find("radius").addEventListener("input", step);
  filter();
  if (data.samples.length > 0) show(data.samples[0]);
}

const held = document.getElementById("data");
if (held !== null) explorer(JSON.parse(held.textContent));
document.querySelectorAll("table.sortable").forEach(sortable);
