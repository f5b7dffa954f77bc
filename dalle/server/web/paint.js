"use strict";
// Painting what is drawn anew of a picture: by mouse, pen or finger, or with keys. What is painted is a mask of the
// bundle's own size; a picture that is not square is seen, and painted, in its middle square.

class Painting {
  constructor(canvas, brush, onChange) {
    Object.assign(this, { canvas, brush, onChange, size: 5, erases: false, side: 0, past: [], at: null });
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const type of ["pointerup", "pointercancel"]) canvas.addEventListener(type, () => (this.last = null));
    canvas.addEventListener("pointerleave", () => this.#point(null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && this.#point(this.at ?? this.#middle()));
    canvas.addEventListener("blur", () => this.#point(null));
  }

  // Begins with a picture of which nothing is painted.
  async open(blob, side) {
    this.close();
    const image = new Image();
    image.src = URL.createObjectURL(blob);
    await image.decode();
    Object.assign(this, { blob, image, side, past: [], at: null, mask: new Uint8Array(side * side) });
    this.canvas.width = this.canvas.height = side;
    this.#show();
  }

  close() {
    if (this.image) URL.revokeObjectURL(this.image.src);
    this.image = this.blob = this.mask = null;
  }

  get share() {
    return this.mask.reduce((sum, one) => sum + one, 0) / this.mask.length;
  }

  undo() {
    if (this.past.length) this.mask = this.past.pop();
    this.#show();
  }

  clear() {
    this.#remember();
    this.mask.fill(0);
    this.#show();
  }

  invert() {
    this.#remember();
    this.mask = this.mask.map((one) => 1 - one);
    this.#show();
  }

  // The mask as a PNG of the picture's proportions, transparent where it is painted.
  async file() {
    const { image, side } = this, short = Math.min(image.width, image.height);
    const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
    // the middle square lies on whole pixels
    const [width, height] = [image.width, image.height].map((one) => side + 2 * Math.round(((one / short - 1) * side) / 2));
    Object.assign(canvas, { width, height });
    pen.fillRect(0, 0, width, height);
    const square = pen.createImageData(side, side);
    for (let i = 0; i < this.mask.length; i++) square.data[4 * i + 3] = this.mask[i] ? 0 : 255;
    pen.putImageData(square, (width - side) / 2, (height - side) / 2);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  #remember() {
    this.past.push(this.mask.slice());
    if (this.past.length > 50) this.past.shift();
  }

  #stamp(x, y) {
    const { side, size } = this, r = size / 2;
    for (let j = Math.max(0, Math.floor(y - r)); j < Math.min(side, y + r); j++)
      for (let i = Math.max(0, Math.floor(x - r)); i < Math.min(side, x + r); i++)
        if (Math.hypot(i + 0.5 - x, j + 0.5 - y) <= r) this.mask[j * side + i] = this.erases ? 0 : 1;
  }

  #line([x0, y0], [x1, y1]) {
    const n = Math.max(1, Math.ceil(Math.hypot(x1 - x0, y1 - y0) / Math.max(1, this.size / 4)));
    for (let k = 0; k <= n; k++) this.#stamp(x0 + ((x1 - x0) * k) / n, y0 + ((y1 - y0) * k) / n);
    this.#show();
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.side, ((event.clientY - box.top) / box.height) * this.side];
  }

  #down(event) {
    if (!this.mask || event.button) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.#remember();
    this.last = this.#place(event);
    this.#line(this.last, this.last);
  }

  #move(event) {
    if (!this.mask) return;
    for (const one of this.last ? (event.getCoalescedEvents?.() ?? [event]) : []) {
      const place = this.#place(one);
      this.#line(this.last, place);
      this.last = place;
    }
    if (event.pointerType === "mouse") this.#point(this.#place(event));
  }

  #middle() {
    return [this.side / 2, this.side / 2];
  }

  #key(event) {
    if (!this.mask) return;
    const step = event.shiftKey ? 1 : Math.max(1, this.size / 2);
    const [dx, dy] = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key] ?? [0, 0];
    const at = this.at ?? this.#middle();
    if (dx || dy) this.#point([at[0] + dx, at[1] + dy].map((one) => Math.max(0, Math.min(this.side, one))));
    else if (event.key === " " || event.key === "Enter") {
      this.#remember();
      this.#line(at, at);
      this.#point(at);
    } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) this.undo();
    else return;
    event.preventDefault();
  }

  // Shows the brush somewhere, or not at all.
  #point(place) {
    this.at = place ?? this.at;
    this.brush.hidden = !place;
    if (!place) return;
    const share = (one) => `${(100 * one) / this.side}%`;
    Object.assign(this.brush.style, { left: share(place[0]), top: share(place[1]), width: share(this.size), height: share(this.size) });
  }

  #show() {
    const { canvas, image, side, mask } = this, pen = canvas.getContext("2d", { willReadFrequently: true });
    const short = Math.min(image.width, image.height);
    pen.drawImage(image, (image.width - short) / 2, (image.height - short) / 2, short, short, 0, 0, side, side);
    const pixels = pen.getImageData(0, 0, side, side), { data } = pixels;
    for (let i = 0; i < mask.length; i++) {
      if (!mask[i]) continue;
      // magenta, in stripes that can be told without seeing colour
      const stripe = (Math.floor(i / side) + (i % side)) % 4 < 2 ? 0.75 : 0.5;
      [230, 0, 170].forEach((one, c) => (data[4 * i + c] = stripe * one + (1 - stripe) * data[4 * i + c]));
    }
    pen.putImageData(pixels, 0, 0);
    this.onChange();
  }
}
