/** The sampler's settings as fields of a form, made from what the service says of them in its OpenAPI document. */

const SHOWN_FIRST = ["steps", "temperature"]; // beside the sampler; the others are folded away

/** What may stand in a field: the parts of a JSON schema that say so, references followed. */
function forms(schema, known) {
  if (schema.$ref) return forms(known[schema.$ref.split("/").at(-1)], known);
  return schema.anyOf ? schema.anyOf.flatMap((one) => forms(one, known)) : [schema];
}

/** What a setting is: its own description, or that of one of its forms. */
function description(schema, known) {
  // In a form a setting that is null is a field that is left empty.
  if (schema.$ref || schema.description) return (schema.description ?? "").replace(/\bnull\b/, "empty");
  return (schema.anyOf ?? []).map((one) => description(one, known)).find(Boolean) ?? "";
}

/** What was typed, as JSON: a number, a list of numbers, or the words themselves for the service to judge. */
export function typed(text) {
  const trimmed = text.trim();
  if (trimmed === "true" || trimmed === "false") return trimmed === "true";
  const number = (word) => (word.trim() !== "" && Number.isFinite(Number(word)) ? Number(word) : null);
  const listed = trimmed.replace(/^\[|\]$/g, "").split(",").map(number);
  if (listed.includes(null)) return trimmed;
  return listed.length > 1 || trimmed.startsWith("[") ? listed : listed[0];
}

export class Settings {
  /**
   * main, more: where the fields go; schemas: those of the OpenAPI document; served: the model's description
   * (`samplers`: the settings of each, `sampling`: the service's own).
   */
  constructor(main, more, schemas, served) {
    this.served = served;
    this.fields = new Map(); // by setting
    const own = new Set(Object.values(served.samplers).flat());
    for (const [name, schema] of Object.entries(schemas.SamplingConfig.properties)) {
      if (name === "guidance" && !served.classes) continue;
      const field = name === "sampler" ? this.#samplers() : this.#field(name, schema, schemas);
      field.own = own.has(name);
      this.fields.set(name, field);
    }
    const first = ["sampler", ...SHOWN_FIRST].filter((name) => this.fields.has(name));
    main.prepend(...first.map((name) => this.fields.get(name).box));
    more.append(...[...this.fields].filter(([name]) => !first.includes(name)).map(([, field]) => field.box));
    this.#fit();
  }

  #samplers() {
    const input = document.createElement("select");
    input.id = "set-sampler";
    input.append(...Object.keys(this.served.samplers).map((name) => new Option(name.replaceAll("_", " "), name)));
    input.value = this.#default;
    input.addEventListener("change", () => this.#fit());
    return { input, box: box("Sampler", input) };
  }

  #field(name, schema, known) {
    const kinds = forms(schema, known);
    const words = kinds.flatMap((form) => form.enum ?? (form.const === undefined ? [] : [form.const]));
    const switched = kinds.some((form) => form.type === "boolean");
    const free = kinds.some((form) => ["integer", "number", "array"].includes(form.type));
    const input = document.createElement(switched || (words.length && !free) ? "select" : "input");
    input.id = `set-${name}`;
    if (input instanceof HTMLSelectElement) {
      const choices = switched ? [["on", "true"], ["off", "false"]] : words.map((word) => [word, word]);
      input.append(new Option("", ""), ...choices.map(([text, value]) => new Option(text, value)));
    } else if (words.length) {
      const list = document.createElement("datalist");
      list.id = `${input.id}-words`;
      list.append(...words.map((word) => new Option(word)));
      input.setAttribute("list", list.id);
      return { input, box: box(label(name), input, description(schema, known), list) };
    } else if (!kinds.some((form) => form.type === "array")) {
      input.inputMode = "decimal";
    }
    const hint = SHOWN_FIRST.includes(name) ? "" : description(schema, known);
    const field = { input, box: box(label(name), input, hint) };
    if (!hint) input.title = description(schema, known);
    return field;
  }

  get #default() {
    return this.served.sampling.sampler ?? Object.keys(this.served.samplers)[0];
  }

  /** Show the settings that the chosen sampler has, and what they are if left alone. */
  #fit() {
    const sampler = this.fields.get("sampler").input.value;
    for (const [name, { input, box, own }] of this.fields) {
      if (name === "sampler") continue;
      box.hidden = own && !this.served.samplers[sampler].includes(name);
      const value = own && sampler !== this.#default ? null : this.served.sampling[name];
      const words = value === null || value === undefined ? "default" : String(value);
      if (input instanceof HTMLSelectElement) input.options[0].textContent = words;
      else input.placeholder = words;
    }
  }

  /** The changes to the service's own settings. */
  get changes() {
    const found = {};
    for (const [name, { input, box }] of this.fields) {
      if (name === "sampler" ? input.value !== this.#default : !box.hidden && input.value.trim() !== "") {
        found[name] = name === "sampler" ? input.value : typed(input.value);
      }
    }
    return found;
  }
}

const label = (name) => (name === "top_p" || name === "top_k" ? name.replace("_", "-") : name.replaceAll("_", " "))
  .replace(/^./, (first) => first.toUpperCase());

function box(words, input, hint = "", ...rest) {
  const element = document.createElement("div");
  element.className = "field";
  const name = document.createElement("label");
  name.htmlFor = input.id;
  name.textContent = words;
  element.append(name, input, ...rest);
  if (hint) {
    const note = document.createElement("p");
    note.className = "hint";
    note.id = `${input.id}-hint`;
    note.textContent = hint;
    input.setAttribute("aria-describedby", note.id);
    element.append(note);
  }
  return element;
}
