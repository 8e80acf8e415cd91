// A transparent layer over the figure: it takes the mouse, the finger and the keyboard, shows what is under them, and
// tells Python what is wanted. It stands where the figure stands; places are shares of its width, so it knows no pixels.
const UNIT = 2 ** 30;

const make = (tag, name, parent, attributes = {}) => {
  const made = document.createElement(tag);
  made.className = name;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent?.append(made);
  return made;
};

const spell = (gib) => (gib < 1 ? `${Math.round(gib * 1024)} MiB` : `${gib.toFixed(1)} GiB`);

export default {
  render({ model, el }) {
    // JupyterLab's own keys (c copies a cell, x cuts it) must not be meant.
    el.addEventListener("keydown", (event) => {
      if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
    });
    const marks = make("div", "wb-marks", el);
    const texts = make("div", "wb-texts", el);
    const limits = make("div", "wb-limits", el);
    const strip = make("div", "wb-strip", el, { "aria-hidden": "true" });
    const list = make("div", "wb-blocks", el, {
      role: "listbox", tabindex: "0", "aria-multiselectable": "true",
      "aria-label": "Layers, in the order in which they run. Arrow keys go through them, Shift selects several, " +
        "Enter opens the menu of devices; a digit moves to that GPU, c to the CPU, d to the disk.",
    });
    const shade = make("div", "wb-chosen", list, { "aria-hidden": "true" });
    const tip = make("div", "wb-tip", el, { role: "tooltip" });
    const menu = make("div", "wb-menu", el, { role: "menu", "aria-label": "Move to", tabindex: "-1" });
    const said = make("div", "wb-said", el, { role: "status", "aria-live": "polite" });
    tip.hidden = menu.hidden = shade.hidden = true;

    let picture = model.get("picture");
    let from = -1, to = -1; // what is selected, from where it was begun to where it ends
    const held = {}; // device -> the limit that a hand holds, in GiB
    const range = () => [Math.min(from, to), Math.max(from, to)];
    const left = (index) => (100 * (index + 0.1)) / (picture.count + 0.2);
    const wide = (count) => (100 * count) / (picture.count + 0.2);
    const say = (text) => { if (said.textContent !== text) said.textContent = text; };

    // --- the layers ---------------------------------------------------------------------------------------------

    const chosen = () => {
      if (from < 0) return "";
      const [a, b] = range();
      return a === b ? `${picture.names[a]} on ${picture.homes[a]}, ${picture.sizes[a]}`
        : `${b - a + 1} layers, ${picture.names[a]} to ${picture.names[b]}`;
    };
    const mark = () => {
      const [a, b] = range();
      shade.hidden = from < 0;
      if (from >= 0) { shade.style.left = `${left(a)}%`; shade.style.width = `${wide(b - a + 1)}%`; }
      for (const [index, option] of options.entries()) {
        const now = String(from >= 0 && index >= a && index <= b);
        if (option.getAttribute("aria-selected") !== now) option.setAttribute("aria-selected", now);
      }
      if (to >= 0 && options[to]) list.setAttribute("aria-activedescendant", options[to].id);
      else list.removeAttribute("aria-activedescendant");
    };
    const select = (a, b) => {
      from = a; to = b;
      mark();
      if (a !== b) say(`${chosen()} selected`);
    };
    const explain = (index) => {
      tip.hidden = index < 0;
      if (index < 0) return;
      if (tip.innerHTML !== picture.tips[index]) tip.innerHTML = picture.tips[index]; // escaped where it is made
      place(tip, index);
    };
    const place = (what, index) => {
      const box = el.clientWidth - picture.left - picture.right;
      const side = what === tip ? left(index) + wide(1) / 2 : left(Math.max(from, to) + 1);
      const begin = picture.left + (box * side) / 100 + (what === tip ? -what.offsetWidth / 2 : 6);
      let edge = Math.max(0, Math.min(begin, el.clientWidth - what.offsetWidth));
      const before = picture.left + (box * left(Math.min(from, to))) / 100 - what.offsetWidth - 6;
      if (what === menu && begin > edge && before >= 0) edge = before; // beside what is chosen, not on it
      what.style.left = `${edge}px`;
      if (what === tip) what.style.bottom = `${el.clientHeight - picture.layers_top + 26}px`;
      else what.style.top = `${picture.layers_top + 8}px`;
    };
    const move = (device) => {
      if (from < 0) return;
      const [a, b] = range();
      closeMenu();
      model.send({ move: picture.names.slice(a, b + 1), device });
    };
    const at = (event) => {
      const box = list.getBoundingClientRect();
      const index = Math.floor(((event.clientX - box.left) / box.width) * (picture.count + 0.2) - 0.1);
      return Math.max(0, Math.min(picture.count - 1, index));
    };

    let options = [];
    const prefix = `wb-${Math.random().toString(36).slice(2)}`;
    const drawList = () => {
      while (options.length > picture.count) options.pop().remove();
      while (options.length < picture.count) {
        options.push(make("div", "wb-block", list, { role: "option", id: `${prefix}-${options.length}` }));
      }
      options.forEach((option, index) => {
        const label = `${picture.names[index]} on ${picture.homes[index]}, ${picture.sizes[index]}`;
        if (option.getAttribute("aria-label") !== label) option.setAttribute("aria-label", label);
        option.classList.toggle("wb-tied", picture.tied.includes(index));
        option.classList.toggle("wb-whole", picture.whole.includes(index));
        option.style.left = `${left(index)}%`;
        option.style.width = `${wide(1)}%`;
      });
      if (Math.max(from, to) >= picture.count) from = to = -1;
      list.style.top = `${picture.layers_top}px`;
      list.style.height = `${picture.layers_height}px`;
      mark();
    };

    let pressed = false;
    list.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.preventDefault();
      list.focus({ preventScroll: true });
      closeMenu();
      const index = at(event);
      if (event.shiftKey && from >= 0) select(from, index);
      else select(index, index);
      pressed = true;
      list.setPointerCapture(event.pointerId);
    });
    list.addEventListener("pointermove", (event) => {
      const index = at(event);
      if (pressed && index !== to) select(from, index);
      if (menu.hidden) explain(pressed ? -1 : index);
    });
    list.addEventListener("pointerup", () => {
      if (!pressed) return;
      pressed = false;
      explain(-1);
      openMenu();
    });
    list.addEventListener("pointercancel", () => { pressed = false; });
    list.addEventListener("pointerleave", () => { if (!pressed) explain(-1); });
    list.addEventListener("contextmenu", (event) => {
      event.preventDefault();
      const index = at(event), [a, b] = range();
      if (from < 0 || index < a || index > b) select(index, index);
      openMenu();
    });
    list.addEventListener("focus", () => {
      if (from < 0 && picture.count && !pressed) select(0, 0);
    });
    list.addEventListener("blur", () => { if (menu.hidden) explain(-1); });
    list.addEventListener("keydown", (event) => {
      const last = picture.count - 1;
      const goal = { ArrowLeft: to - 1, ArrowRight: to + 1, Home: 0, End: last, PageUp: to - 10, PageDown: to + 10 };
      const key = event.key;
      if (key in goal) {
        const index = Math.max(0, Math.min(last, goal[key]));
        select(event.shiftKey && from >= 0 ? from : index, index);
        explain(index);
      } else if ((event.ctrlKey || event.metaKey) && key === "a") select(0, last);
      else if (event.ctrlKey || event.metaKey || event.altKey) { if (!travel(event)) return; }
      else if (key === "Enter" || key === " " || key === "F10" || key === "ContextMenu") { explain(-1); openMenu(); }
      else if (key === "Escape") { from = to = -1; explain(-1); mark(); say("Nothing selected"); }
      else if (/^[0-9]$/.test(key)) move(`cuda:${key}`);
      else if (key === "c") move("cpu");
      else if (key === "d") move("disk");
      else if (key === "m") move("mps");
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const travel = (event) => {
      const key = event.key.toLowerCase();
      if (key === "z") model.send({ [event.shiftKey ? "redo" : "undo"]: true });
      else if (key === "y") model.send({ redo: true });
      else return false;
      return true;
    };

    // --- the menu -----------------------------------------------------------------------------------------------

    const keyOf = (label) => ({ cpu: "c", disk: "d", mps: "m" })[label] ?? label.replace("cuda:", "");
    const openMenu = () => {
      if (from < 0) return;
      const [a, b] = range();
      menu.replaceChildren();
      make("div", "wb-menu-title", menu, { role: "presentation" }).textContent =
        a === b ? picture.names[a] : `${b - a + 1} layers`;
      const entry = (text, note, action) => {
        const item = make("button", "wb-menu-item", menu, { type: "button", role: "menuitem", tabindex: "-1" });
        make("span", "", item).textContent = text;
        make("span", "wb-menu-note", item).textContent = note;
        item.addEventListener("click", () => { list.focus({ preventScroll: true }); action(); });
        return item;
      };
      for (const bar of picture.bars) {
        const item = entry(`Move to ${bar.label}`, `${bar.free} free · key ${keyOf(bar.label)}`, () => move(bar.label));
        item.style.borderLeftColor = bar.colour;
      }
      if (a === b) entry("Why is it here?", "", () => { closeMenu(); model.send({ why: picture.names[a] }); });
      menu.hidden = false;
      place(menu, to);
      menu.querySelector("button")?.focus({ preventScroll: true });
    };
    const closeMenu = () => { menu.hidden = true; };
    menu.addEventListener("keydown", (event) => {
      const items = [...menu.querySelectorAll("button")];
      const index = items.indexOf(document.activeElement);
      const goal = { ArrowDown: index + 1, ArrowUp: index - 1, Home: 0, End: items.length - 1 }[event.key];
      if (goal !== undefined) items[(goal + items.length) % items.length].focus();
      else if (event.key === "Escape" || event.key === "Tab") { closeMenu(); list.focus({ preventScroll: true }); }
      else if (event.key === "Enter" || event.key === " ") { items[index]?.click(); }
      else {
        const bar = picture.bars.find((each) => keyOf(each.label) === event.key);
        if (!bar) return;
        list.focus({ preventScroll: true });
        move(bar.label);
      }
      event.preventDefault();
      event.stopPropagation();
    });
    const away = (event) => { if (!menu.hidden && !el.contains(event.target)) closeMenu(); };
    document.addEventListener("pointerdown", away);

    // --- the limits ---------------------------------------------------------------------------------------------

    const handles = new Map();
    const limitOf = (bar) => held[bar.label] ?? bar.limit_bytes / UNIT;
    const moveLimit = (bar, gib) => {
      const steps = Math.round(gib / bar.step_gib);
      const wanted = Math.max(0, Math.min(bar.most_gib, Number((steps * bar.step_gib).toFixed(6))));
      if (wanted === held[bar.label]) return;
      held[bar.label] = wanted;
      drawLimit(bar);
      // A trait, not a message: while one is on its way the next ones are merged, so nothing queues.
      model.set("limit", { device: bar.label, gib: wanted, nth: (model.get("limit").nth ?? 0) + 1 });
      model.save_changes();
    };
    const drawLimit = (bar) => {
      const handle = handles.get(bar.label);
      handle.style.left = `${Math.min(100, (100 * limitOf(bar) * UNIT) / bar.width_bytes / 1.004)}%`;
      handle.setAttribute("aria-valuenow", limitOf(bar).toFixed(2));
      handle.setAttribute("aria-valuetext", spell(limitOf(bar)));
      const bytes = Math.round(limitOf(bar) * UNIT).toLocaleString("en");
      handle.title = `Limit for weights on ${bar.label}: ${spell(limitOf(bar))} (${bytes} bytes). Drag it, or use the arrow keys.`;
    };
    const makeHandle = (label) => {
      const handle = make("div", `wb-limit wb-limit-${label.replace(":", "-")}`, limits, {
        role: "slider", tabindex: "0", "aria-label": `Limit for weights on ${label}, in GiB`, "aria-valuemin": "0",
      });
      const bar = () => picture.bars.find((each) => each.label === label);
      let scale = 0; // GiB a pixel, as it was when the hand took hold: the picture may be scaled anew meanwhile
      let began = [0, 0];
      handle.addEventListener("pointerdown", (event) => {
        event.preventDefault();
        handle.focus({ preventScroll: true });
        handle.setPointerCapture(event.pointerId);
        scale = (1.004 * bar().width_bytes) / UNIT / limits.clientWidth;
        began = [event.clientX, bar().limit_bytes / UNIT];
        held[label] = began[1];
        handle.classList.add("wb-held");
      });
      handle.addEventListener("pointermove", (event) => {
        if (scale) moveLimit(bar(), began[1] + (event.clientX - began[0]) * scale);
      });
      // What the hand wanted stands until Python has caught up, or for a moment, should it have been refused.
      const release = () => {
        const wanted = held[label];
        setTimeout(() => {
          if (scale || held[label] !== wanted) return;
          delete held[label];
          if (bar()) drawLimit(bar());
        }, 500);
      };
      const letGo = () => {
        if (!scale) return;
        scale = 0;
        handle.classList.remove("wb-held");
        release();
        say(`Limit of ${label} ${handle.getAttribute("aria-valuetext")}`);
      };
      handle.addEventListener("pointerup", letGo);
      handle.addEventListener("pointercancel", letGo);
      handle.addEventListener("keydown", (event) => {
        const { step_gib: step, most_gib: most, limit_bytes: now } = bar();
        const limit = held[label] ?? now / UNIT;
        const goal = {
          ArrowRight: limit + step, ArrowUp: limit + step, ArrowLeft: limit - step, ArrowDown: limit - step,
          PageUp: limit + 10 * step, PageDown: limit - 10 * step, Home: 0, End: most,
        }[event.key];
        if (goal !== undefined) moveLimit(bar(), goal);
        else if (!((event.ctrlKey || event.metaKey) && travel(event))) return;
        event.preventDefault();
        event.stopPropagation();
      });
      for (const end of ["keyup", "blur"]) {
        handle.addEventListener(end, () => {
          if (!scale && label in held) release();
        });
      }
      return handle;
    };
    const drawLimits = () => {
      const labels = picture.bars.map((bar) => bar.label);
      for (const [label, handle] of handles) if (!labels.includes(label)) { handle.remove(); handles.delete(label); }
      for (const bar of picture.bars) {
        if (!handles.has(bar.label)) handles.set(bar.label, makeHandle(bar.label));
        const handle = handles.get(bar.label);
        handle.style.top = `${bar.top - 5}px`;
        handle.style.height = `${picture.bar_height + 10}px`;
        handle.setAttribute("aria-valuemax", bar.most_gib.toFixed(2));
        drawLimit(bar);
      }
    };

    // --- marks that stand still -----------------------------------------------------------------------------------

    const drawTexts = () => {
      while (texts.children.length > picture.bars.length) texts.lastChild.remove();
      picture.bars.forEach((bar, row) => {
        const line = texts.children[row] ?? make("div", "wb-bar-text", texts);
        line.style.top = `${bar.top - 18}px`;
        line.dataset.weights = bar.weights; // what the figure has to show for this
        if (line.innerHTML !== picture.texts[row]) line.innerHTML = picture.texts[row]; // nothing in it was typed
        line.title = line.textContent;
      });
    };
    const drawMarks = () => {
      marks.replaceChildren();
      for (const bar of picture.bars) {
        const put = (name, share, title) => {
          const made = make("div", name, marks, { title });
          made.style.left = `${Math.min(100, (100 * share) / 1.004)}%`;
          made.style.top = `${bar.top}px`;
          made.style.height = `${picture.bar_height}px`;
          return made;
        };
        if (bar.pinned !== null) {
          const ghost = put("wb-ghost", 0, `${bar.label}, pinned`);
          ghost.style.width = `${(100 * bar.pinned) / 1.004}%`;
        }
        if (bar.measured !== null) put("wb-measured", bar.measured, `${bar.label}, weights as measured`);
        const live = model.get("live")[bar.label];
        if (live !== undefined) {
          const now = put("wb-live", live[0] / bar.width_bytes, live[1]);
          now.setAttribute("data-text", live[1]);
          now.classList.toggle("wb-live-left", live[0] / bar.width_bytes > 0.6);
        }
      }
    };
    let room = 600; // as wide as the layers are, kept: to ask for it in between makes the browser lay all out anew
    const drawStrip = () => {
      strip.replaceChildren();
      strip.style.top = `${picture.layers_top - 22}px`;
      for (const [first, last, label, colour, fetched, text] of picture.runs) {
        const run = make("div", "wb-run", strip, { title: text });
        run.style.left = `${left(first)}%`;
        run.style.width = `${wide(last - first + 1)}%`;
        run.style.setProperty("--wb-run", colour);
        const pixels = (wide(last - first + 1) * room) / 100;
        if (pixels > 38) run.textContent = fetched ? `${label} · fetches ${fetched} a token` : label;
      }
      for (const [after, amount, text] of picture.crossings) {
        const arrow = make("div", "wb-crossing", strip, { title: text });
        arrow.style.left = `${left(after + 1)}%`;
        const before = picture.runs.find((run) => run[1] === after);
        const pixels = before ? (wide(before[1] - before[0] + 1) * room) / 100 : 0;
        arrow.textContent = pixels > 130 ? `→ ${amount}` : "→";
      }
    };
    // Messages to a page that is still loading the figure's code can get lost, and the figure then stands there empty.
    let looking = 0;
    const lookAfter = (times) => {
      clearTimeout(looking);
      looking = setTimeout(() => {
        const plot = el.parentElement?.querySelector(".js-plotly-plot");
        const shown = Array.from(plot?.data?.find((trace) => trace.name === "weights")?.x ?? []);
        const right = picture.bars.every((bar, row) => Math.abs(bar.weights - shown[row]) < 1e-6);
        if (plot && !right) model.send({ stale: true });
        else if (!plot && times) lookAfter(times - 1);
      }, 3000);
    };
    const draw = () => {
      picture = model.get("picture");
      if (!picture.bars) return;
      // As wide as the figure, which is so wide in every place where it is displayed.
      el.style.width = picture.width ? `${picture.width}px` : "";
      for (const box of [marks, texts, limits, strip, list]) {
        box.style.left = `${picture.left}px`;
        box.style.right = `${picture.right}px`;
      }
      drawList(); drawTexts(); drawLimits(); drawStrip(); drawMarks();
      lookAfter(8);
    };
    model.on("change:picture", draw);
    model.on("change:live", drawMarks);
    const ruler = new ResizeObserver(() => {
      if (!picture.bars) return;
      room = Math.max(0, el.clientWidth - picture.left - picture.right) || 600;
      drawStrip();
    });
    ruler.observe(el);
    draw();
    return () => {
      clearTimeout(looking);
      ruler.disconnect();
      model.off("change:picture", draw);
      model.off("change:live", drawMarks);
      document.removeEventListener("pointerdown", away);
    };
  },
};
