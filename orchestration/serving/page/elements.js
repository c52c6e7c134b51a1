/** Small helpers for what stands on the page. */

export const $ = (id) => document.getElementById(id);

/** A new element with properties; `children` are elements or words. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Rows of a list of facts: `[term, words or element, what a click copies]`. */
export function showFacts(list, rows) {
  const shown = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
  list.replaceChildren(
    ...shown.map(([term, value, copied]) => {
      const data = make("dd", {}, value instanceof Node ? value : String(value));
      if (copied !== undefined) data.append(copier(`Copy ${term.toLowerCase()}`, () => copied, true));
      return make("div", {}, make("dt", { textContent: term }), data);
    }),
  );
}

/** Tell something to who hears the page. */
export function say(words) {
  $("said").textContent = words;
}

/** A sign from the symbols at the end of index.html. */
function sign(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#${name}-sign`);
  svg.append(use);
  return svg;
}

/** A button that copies `words()`, unless that is null; small: it shows a sign in place of its name. */
export function copier(name, words, small = false) {
  const button = make("button", { type: "button", className: small ? "minor small" : "minor" });
  const rest = () => button.replaceChildren(small ? sign("copy") : name);
  if (small) {
    button.setAttribute("aria-label", name);
    button.title = name;
  }
  rest();
  button.addEventListener("click", async () => {
    const text = words();
    if (text === null) return;
    const done = await copy(text);
    say(done ? "Copied." : "The browser does not allow copying.");
    button.replaceChildren(done ? (small ? sign("done") : "Copied") : small ? "✕" : "Not allowed");
    setTimeout(rest, 1500);
  });
  return button;
}

/** Put words on the clipboard, also where a page without encryption may not use the modern way. Whether it worked. */
async function copy(words) {
  try {
    await navigator.clipboard.writeText(words);
    return true;
  } catch {
    const area = make("textarea", { value: words, className: "unseen" });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
}
