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

  function vertical(chart) {
    return (u, low, high) => {
      if (chart.stacked) return [0, 100];
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

  function build(node, chart) {
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
    const isWhole = !chart.log && (!chart.ranges.length || data[0][1] - data[0][0] >= 1);
    const powers = [...Array(16).keys()].map(power => 10 ** power);
    const whole = isWhole ? { incrs: powers.flatMap(power => [power, 2 * power, 5 * power]) } : {};
    return new uPlot({
      width: node.clientWidth || 480,
      height: chart.ranges.length ? 170 : 230,
      padding: [chart.marks.length ? 22 : 8, 24, 0, 0],
      series, bands,
      scales: {
        x: {
          time: false,
          distr: chart.log ? 3 : 1,
          range: (u, low, high) => low === high ? [low - 0.5, high + 0.5] : [low, high],
        },
        y: { range: vertical(chart) },
      },
      axes: [
        {
          ...axis,
          ...whole,
          values: (u, ticks) =>
            ticks.map(x => x == null ? "" : chart.ranges.length ? short(x) : x.toLocaleString("en")),
        },
        { ...axis, size: 56, values: (u, ticks) => ticks.map(y => short(y) + chart.unit) },
      ],
      cursor: chart.ranges.length
        ? { dataIdx: (u, number, near, x) => Math.max(0, u.data[0][near] > x ? near - 1 : near) }
        : { sync: { key: chart.axis } },
      hooks: { draw: [u => drawMarks(u, chart.marks)] },
    }, data, node);
  }

  const charts = [...document.querySelectorAll(".chart")].map(node => [node, JSON.parse(node.textContent)]);
  let plots = [];
  function draw() {
    for (const plot of plots) plot.destroy();
    plots = charts.map(([node, chart]) => build(node, chart));
  }
  draw();
  addEventListener("resize", () => {
    for (const plot of plots) plot.setSize({ width: plot.root.parentNode.clientWidth, height: plot.height });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
