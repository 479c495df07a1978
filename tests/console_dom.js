// A document of the smallest kind, to run the console's `morph` without a browser: `node console_dom.js console.js`.
// Prints JSON: the tree after each step, and whether the kept nodes are the very same ones.
"use strict";
const fs = require("fs");

class N {
  constructor(name, attrs = {}, children = [], value = null) {
    Object.assign(this, { nodeName: name, nodeType: name === "#text" ? 3 : 1, nodeValue: value, parentNode: null, childNodes: [] });
    this.map = new Map(Object.entries(attrs));
    for (const child of children) this.insertBefore(child, null);
  }
  get id() { return this.map.get("id") || ""; }
  get attributes() { return [...this.map].map(([name, value]) => ({ name, value })); }
  get children() { return this.childNodes.filter((node) => node.nodeType === 1); }
  get firstChild() { return this.childNodes[0] || null; }
  get nextSibling() { const all = this.parentNode.childNodes; return all[all.indexOf(this) + 1] || null; }
  hasAttribute(name) { return this.map.has(name); }
  getAttribute(name) { return this.map.get(name) ?? null; }
  setAttribute(name, value) { this.map.set(name, value); }
  removeAttribute(name) { this.map.delete(name); }
  remove() { const all = this.parentNode.childNodes; all.splice(all.indexOf(this), 1); this.parentNode = null; }
  insertBefore(node, before) {
    if (node.parentNode) node.remove();
    const at = before ? this.childNodes.indexOf(before) : this.childNodes.length;
    this.childNodes.splice(at, 0, node);
    node.parentNode = this;
  }
  replaceWith(node) { this.parentNode.insertBefore(node, this); this.remove(); }
  shape() { return this.nodeType === 3 ? this.nodeValue : [this.nodeName, Object.fromEntries(this.map), this.childNodes.map((node) => node.shape())]; }
}
const text = (value) => new N("#text", {}, [], value);
const built = (shape) => typeof shape === "string" ? text(shape) : new N(shape[0], shape[1], shape[2].map(built));

global.Node = { ELEMENT_NODE: 1 };
global.document = { getElementById: () => null };
global.location = { hash: "" };
const morph = new Function(fs.readFileSync(process.argv[2], "utf8") + "; return morph;")();
const results = [];
for (const [before, after] of JSON.parse(fs.readFileSync(0, "utf8"))) {
  const old = built(before), kept = new Map(), same = [];
  (function walk(node) { if (node.id) kept.set(node.id, node); node.childNodes.forEach(walk); })(old);
  morph(old, built(after));
  (function walk(node) { if (kept.get(node.id) === node) same.push(node.id); node.childNodes.forEach(walk); })(old);
  results.push({ shape: old.shape(), same });
}
process.stdout.write(JSON.stringify(results));
