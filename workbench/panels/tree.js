// Rows of a tree: Python sends what is seen, and is told what is opened and looked for.
const make = (tag, name, parent, attributes = {}) => {
  const made = document.createElement(tag);
  made.className = name;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent?.append(made);
  return made;
};

export default {
  render({ model, el }) {
    // JupyterLab's own keys (x cuts a cell) must not be meant.
    el.addEventListener("keydown", (event) => {
      if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
    });
    const head = make("div", "wb-tree-head", el);
    const search = make("input", "wb-tree-search", head, {
      type: "search", placeholder: "Search, such as q_proj or layers.3.", "aria-label": "Search modules",
    });
    const names = make("div", "wb-tree-row wb-tree-names", el, { "aria-hidden": "true" });
    for (const name of ["Module", "Device", "Before", "After"]) make("span", "", names).textContent = name;
    const tree = make("div", "wb-tree-rows", el, { role: "tree", "aria-label": "Modules", tabindex: "0" });
    const note = make("div", "wb-tree-note", el, { role: "status" });
    const prefix = `wbt-${Math.random().toString(36).slice(2)}`;
    let at = 0;

    const toggle = (row) => {
      const opened = model.get("opened");
      model.set("opened", row.open ? opened.filter((path) => path !== row.path) : [...opened, row.path]);
      model.save_changes();
    };
    const go = (index) => {
      const rows = tree.children;
      if (!rows.length) return;
      rows[at]?.classList.remove("wb-tree-at");
      at = Math.max(0, Math.min(rows.length - 1, index));
      rows[at].classList.add("wb-tree-at");
      tree.setAttribute("aria-activedescendant", rows[at].id);
      rows[at].scrollIntoView({ block: "nearest" });
    };
    const draw = () => {
      const rows = model.get("rows");
      while (tree.children.length > rows.length) tree.lastChild.remove();
      rows.forEach((row, index) => {
        const text = JSON.stringify(row);
        let line = tree.children[index];
        if (line?.dataset.row === text) return;
        if (!line) line = make("div", "wb-tree-row", tree, { role: "treeitem", id: `${prefix}-${index}` });
        line.dataset.row = text;
        line.replaceChildren();
        line.setAttribute("aria-level", row.level);
        line.setAttribute("aria-label", `${row.path}, ${row.homes.map(([label]) => label).join(" and ") || "no room"}, ` +
          `${row.before} before, ${row.after} after`);
        if (row.open === null) line.removeAttribute("aria-expanded");
        else line.setAttribute("aria-expanded", String(row.open));
        const name = make("span", "wb-tree-name", line, { title: `${row.path} (${row.tensors} tensors)` });
        name.style.paddingLeft = `${(row.level - 1) * 14}px`;
        name.textContent = `${row.open === null ? "\u00a0\u00a0\u2002" : row.open ? "▾ " : "▸ "}${row.label}`;
        const homes = make("span", "wb-tree-homes", line);
        for (const [label, colour] of row.homes) {
          const home = make("span", "wb-tree-home", homes);
          home.style.setProperty("--wb-run", colour);
          home.textContent = label;
        }
        if (!row.homes.length) homes.textContent = "no room";
        make("span", "wb-tree-size", line, { title: row.exact }).textContent = row.before;
        make("span", "wb-tree-size", line, { title: row.exact }).textContent = row.after;
      });
      note.textContent = model.get("note");
      if (at >= rows.length) go(rows.length - 1);
    };
    tree.addEventListener("click", (event) => {
      const line = event.target.closest(".wb-tree-row");
      const index = line ? [...tree.children].indexOf(line) : -1;
      if (index < 0) return;
      go(index);
      const row = model.get("rows")[index];
      if (row.open !== null) toggle(row);
    });
    tree.addEventListener("focus", () => go(at));
    tree.addEventListener("keydown", (event) => {
      const rows = model.get("rows"), row = rows[at];
      if (!row) return;
      const goal = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
      if (goal !== undefined) go(goal);
      else if (event.key === "ArrowRight" && row.open === false) toggle(row);
      else if (event.key === "ArrowRight" && row.open) go(at + 1);
      else if (event.key === "ArrowLeft" && row.open) toggle(row);
      else if (event.key === "ArrowLeft") {
        const above = rows.findLastIndex((each, i) => i < at && each.level < row.level);
        if (above >= 0) go(above);
      }
      else if ((event.key === "Enter" || event.key === " ") && row.open !== null) toggle(row);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    search.value = model.get("search");
    search.addEventListener("input", () => { model.set("search", search.value); model.save_changes(); });
    search.addEventListener("keydown", (event) => event.stopPropagation());
    model.on("change:rows", draw);
    model.on("change:note", draw);
    draw();
    return () => { model.off("change:rows", draw); model.off("change:note", draw); };
  },
};
