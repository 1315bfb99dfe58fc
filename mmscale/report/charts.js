// Draws every ".chart" of the page with uPlot, from the JSON inside it that mmscale/report/charts.py writes.
(() => {
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
  const css = (name, alpha = "") =>
    getComputedStyle(document.documentElement).getPropertyValue(name).trim() + alpha;
  const stepped = uPlot.paths.stepped({ align: 1 });
  const short = value =>
    value == null ? "–"
    : value !== 0 && Math.abs(value) < 1e-3 ? Number(value.toPrecision(3)).toExponential()
    : compact.format(value);

  function vertical(chart, view) {
    return (u, low, high) => {
      if (chart.stacked) return [0, 100];
      if (view.logY) return low == null ? [1, 10] : uPlot.rangeLog(low, high, 10, false);
      const margin = 0.06 * (high - low) || 0.5 * Math.abs(high) || 0.5;
      return [chart.zero && low >= 0 ? 0 : low - margin, high + margin];
    };
  }

  // Dashed lines with names. A name is cut to the space before the next line; the last one moves left instead.
  function drawMarks(u, marks) {
    const { ctx, bbox } = u, ratio = devicePixelRatio, right = bbox.left + bbox.width;
    const places = [...marks.map(([x]) => u.valToPos(x, "x", true)), right];
    ctx.save();
    ctx.font = `600 ${11 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "left";
    ctx.strokeStyle = ctx.fillStyle = css("--soft");
    ctx.setLineDash([3 * ratio, 3 * ratio]);
    marks.forEach(([, name], number) => {
      const x = places[number], isLast = number + 1 === marks.length;
      if (x < bbox.left - 1 || x > right) return;
      if (x > bbox.left + 1) {
        ctx.beginPath();
        ctx.moveTo(x, bbox.top - 16 * ratio);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
      }
      const room = isLast ? Infinity : Math.min(places[number + 1], right) - x - 8 * ratio;
      if (room < 12 * ratio) return;
      let shown = name;
      while (shown.length > 1 && ctx.measureText(shown).width > room) shown = shown.slice(0, -2) + "…";
      const most = ctx.canvas.width - ctx.measureText(shown).width - 4 * ratio;
      ctx.fillText(shown, Math.min(x + 4 * ratio, most), bbox.top - 6 * ratio);
    });
    ctx.restore();
  }

  // Dots on the first line. They are drawn at the place of the nearest point, since curves are thinned.
  function dotPlaces(u, links) {
    const steps = u.data[0], losses = u.data[1];
    return links.map(([x, address]) => {
      let best = -1;
      for (let index = 0; index < steps.length; index++)
        if (losses[index] != null && (best < 0 || Math.abs(steps[index] - x) < Math.abs(steps[best] - x))) best = index;
      return best < 0 ? null : [u.valToPos(x, "x", false), u.valToPos(losses[best], "y", false), address];
    }).filter(place => place !== null);
  }

  function drawDots(u, links) {
    const { ctx, bbox } = u, ratio = devicePixelRatio;
    ctx.save();
    ctx.fillStyle = css("--bad");
    for (const [left, top] of dotPlaces(u, links)) {
      const x = bbox.left + left * ratio, y = bbox.top + top * ratio;
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.arc(x, y, 4 * ratio, 0, 2 * Math.PI);
      ctx.fill();
    }
    ctx.restore();
  }

  function linkAt(u, links, event) {
    const near = dotPlaces(u, links).find(([x, y]) => Math.hypot(x - event.offsetX, y - event.offsetY) < 9);
    return near === undefined ? "" : near[2];
  }

  function openLinks(u, links) {
    u.over.addEventListener("click", event => {
      const address = linkAt(u, links, event);
      if (address) location.href = address;
    });
    u.over.addEventListener("mousemove", event => {
      u.over.style.cursor = linkAt(u, links, event) ? "pointer" : "";
    });
  }

  // Buttons of the scales that the values allow: a logarithm needs positive numbers.
  function addButtons(entry) {
    const { node, chart, view } = entry, isPositive = values => values.every(value => value > 0);
    if (chart.ranges.length || chart.stacked) return;
    const choices = [];
    if (chart.lines.every(line => isPositive(line.x))) choices.push(["log " + chart.axis, "logX"]);
    if (chart.lines.every(line => isPositive(line.y) && isPositive(line.low))) choices.push(["log y", "logY"]);
    const row = document.createElement("span");
    row.className = "scales";
    for (const [label, key] of choices) {
      const button = document.createElement("button");
      button.textContent = label;
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => {
        view[key] = !view[key];
        button.setAttribute("aria-pressed", String(view[key]));
        redraw(entry);
      });
      row.append(button);
    }
    node.parentNode.querySelector(".cap").append(row);
  }

  function build(node, chart, view) {
    const isLogX = chart.log || view.logX;
    const series = [{
      label: chart.axis,
      value: (u, x, number, index) =>
        x == null ? "–"
        : chart.ranges.length ? chart.ranges[Math.min(index, chart.ranges.length - 1)]
        : x.toLocaleString("en"),
    }];
    const bands = [], tables = [];
    const add = (x, y, options) => { tables.push([x, y]); return series.push({ scale: "y", ...options }) - 1; };
    for (const line of chart.lines) {
      const fill = alpha => () => css("--c" + line.colour, alpha);
      if (line.low.length) {
        const hidden = { class: "hidden", width: 0, points: { show: false } };
        const low = add(line.x, line.low, hidden), high = add(line.x, line.high, hidden);
        bands.push({ series: [high, low], fill: fill("2a") });
      }
      const total = line.y.slice(0, -1).reduce((a, b) => a + b, 0);
      const place = add(line.x, line.y, {
        label: line.label,
        stroke: fill(line.faint ? "50" : ""),
        width: line.faint ? 1 : 2,
        value: (u, y, number, index) =>
          index == null ? "–"
          : chart.ranges.length ? `${Math.round(y).toLocaleString("en")} (${(100 * y / total).toFixed(1)}%)`
          : short(chart.stacked ? line.y[index] : y) + chart.unit,
      });
      const options = series[place];
      if (chart.ranges.length)
        Object.assign(options, { paths: stepped, fill: fill("b0"), width: 1, points: { show: false } });
      if (chart.stacked && place > 1) bands.push({ series: [place, place - 1], fill: fill("b0") });
      else if (chart.stacked) options.fill = fill("b0");
    }
    const data = uPlot.join(tables);
    if (chart.stacked)
      for (let row = 2; row < data.length; row++) data[row] = data[row].map((y, place) => y + data[row - 1][place]);
    const grid = { stroke: () => css("--hair"), width: 1 };
    const axis = { stroke: () => css("--soft"), grid, ticks: { show: false } };
    const isWhole = !isLogX && (!chart.ranges.length || data[0][1] - data[0][0] >= 1);
    const powers = [...Array(16).keys()].map(power => 10 ** power);
    const whole = isWhole ? { incrs: powers.flatMap(power => [power, 2 * power, 5 * power]) } : {};
    return new uPlot({
      width: node.clientWidth || 480,
      height: chart.ranges.length ? 170 : 248,
      padding: [chart.marks.length ? 22 : 8, 24, 0, 0],
      series, bands,
      scales: {
        x: {
          time: false,
          distr: isLogX ? 3 : 1,
          range: (u, low, high) => low === high ? [low - 0.5, high + 0.5] : [low, high],
        },
        y: { distr: view.logY ? 3 : 1, range: vertical(chart, view) },
      },
      axes: [
        {
          ...axis,
          ...whole,
          ...(chart.ranges.length ? {} : { label: chart.axis, labelSize: 18, labelGap: 0, labelFont: "12px system-ui, sans-serif" }),
          values: (u, ticks) =>
            ticks.map(x => x == null ? "" : chart.ranges.length ? short(x) : x.toLocaleString("en")),
        },
        { ...axis, size: 56, values: (u, ticks) => ticks.map(y => y == null ? "" : short(y) + chart.unit) },
      ],
      cursor: chart.ranges.length
        ? { dataIdx: (u, number, near, x) => Math.max(0, u.data[0][near] > x ? near - 1 : near) }
        : { sync: { key: chart.axis } },
      hooks: {
        draw: [u => drawMarks(u, chart.marks), u => drawDots(u, chart.links)],
        ready: [u => openLinks(u, chart.links)],
      },
    }, data, node);
  }

  const entries = [...document.querySelectorAll(".chart")].map(node => ({
    node, chart: JSON.parse(node.textContent), view: { logX: false, logY: false }, plot: null,
  }));
  function redraw(entry) {
    const zoomed = entry.plot ? { ...entry.plot.scales.x } : { min: null };
    if (entry.plot) entry.plot.destroy();
    entry.plot = null;
    entry.plot = build(entry.node, entry.chart, entry.view);
    if (zoomed.min !== null && !entry.chart.ranges.length) entry.plot.setScale("x", { min: zoomed.min, max: zoomed.max });
  }
  entries.forEach(addButtons);
  entries.forEach(redraw);
  addEventListener("resize", () => {
    for (const { plot } of entries) plot.setSize({ width: plot.root.parentNode.clientWidth, height: plot.height });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => entries.forEach(redraw));
})();
