// Runs the script of a page on a stand-in for the browser's document, and prints what it draws as JSON.
// Usage: node browser.js PAGE. The page's own uPlot draws; the canvas records the calls.
const fs = require("fs"), vm = require("vm");

const page = fs.readFileSync(process.argv[2], "utf8");
const program = page.match(/<script>([\s\S]*?)<\/script>/)[1];
const data = [...page.matchAll(/<script type="application\/json">([\s\S]*?)<\/script>/g)].map(found => found[1]);
let drawn = [];

class Element {
  constructor(tag) {
    Object.assign(this, { tagName: tag, children: [], style: {}, attributes: {}, handlers: {}, textContent: "", className: "" });
    Object.assign(this, { clientWidth: 600, clientHeight: 300 });
    this.classList = { add() {}, remove() {}, contains: () => false };
  }
  append(...added) { for (const one of added) { this.children.push(one); one.parentNode = this; } }
  appendChild(added) { this.append(added); return added; }
  insertBefore(added) { this.append(added); return added; }
  remove() { if (this.parentNode) this.parentNode.children = this.parentNode.children.filter(one => one !== this); }
  setAttribute(name, value) { this.attributes[name] = value; }
  addEventListener(name, handler) { (this.handlers[name] = this.handlers[name] || []).push(handler); }
  removeEventListener() {}
  getBoundingClientRect() { return { left: 0, top: 0, width: 500, height: 200 }; }
  querySelector(selector) { return this.children.find(one => "." + one.className === selector) || null; }
  get childNodes() { return this.children; }
  get firstChild() { return this.children[0] || { nodeValue: "" }; }
  getContext() {
    const own = { canvas: this, measureText: text => ({ width: 7 * text.length }) };
    return new Proxy(own, {
      get: (target, name) => name in target ? target[name] : (...words) => { drawn.push([name, ...words]); },
      set: (target, name, value) => { target[name] = value; return true; },
    });
  }
}

const nodes = data.map(text => {
  const article = new Element("article"), cap = new Element("div"), node = new Element("div");
  cap.className = "cap";
  node.textContent = text;
  article.append(cap, node);
  return node;
});
const nothing = () => {};
const location = { href: "" };
const context = vm.createContext({
  HTMLElement: Element, Intl, Math, JSON, Map, Set, console, location, queueMicrotask, setTimeout, clearTimeout,
  CustomEvent: class {}, Path2D: class { moveTo() {} lineTo() {} rect() {} arc() {} closePath() {} addPath() {} },
  devicePixelRatio: 1, navigator: { language: "en" }, addEventListener: nothing, removeEventListener: nothing,
  dispatchEvent: nothing, requestAnimationFrame: call => setTimeout(call, 0),
  getComputedStyle: () => ({ getPropertyValue: () => "#123456" }),
  matchMedia: () => ({ addEventListener: nothing, removeEventListener: nothing }),
  document: {
    createElement: tag => new Element(tag), documentElement: new Element("html"), body: new Element("body"),
    addEventListener: nothing, removeEventListener: nothing, querySelectorAll: name => name === ".chart" ? nodes : [],
  },
});
context.window = context;
vm.runInContext(program, context);

const texts = () => [...new Set(drawn.filter(call => call[0] === "fillText").map(call => call[1]))];
const count = name => drawn.filter(call => call[0] === name).length;
const inside = element => [element, ...element.children.flatMap(inside)];
const rows = nodes.map(node => (node.parentNode.children[0].querySelector(".scales") || { children: [] }).children);

setTimeout(() => {
  const found = { buttons: rows.map(row => row.map(button => button.textContent)), texts: texts(), dots: count("arc") };
  for (const area of nodes.flatMap(inside).filter(element => element.className === "u-over" || element.handlers.click))
    for (let x = 0; x < 600 && !location.href; x += 4)
      for (let y = 0; y < 260 && !location.href; y += 4)
        for (const click of area.handlers.click || [])
          if (area.tagName === "div") click({ offsetX: x, offsetY: y, stopPropagation: nothing, stopImmediatePropagation: nothing });
  found.opened = location.href;
  drawn = [];
  for (const row of rows) for (const button of row) for (const click of button.handlers.click) click();
  setTimeout(() => {
    found.after = { texts: texts(), dots: count("arc"), pressed: rows.map(row => row.map(button => button.attributes["aria-pressed"])) };
    console.log(JSON.stringify(found));
  }, 50);
}, 50);
