// Which device holds which slice of a parameter: arithmetic only.

const ITEM_BYTES = { float32: 4, float16: 2, bfloat16: 2 };

/** The devices with their coordinates on the mesh; they are listed in its order. */
export function placed(server) {
  return server.devices.map((device, index) => {
    const at = {};
    let rest = index;
    for (const axis of [...server.mesh].reverse()) {
      at[axis.name] = rest % axis.size;
      rest = Math.floor(rest / axis.size);
    }
    return { id: device.id, at };
  });
}

/** The mesh axes that split each axis of a parameter, the outer one first. */
export function splits(parameter) {
  return parameter.axes.map((axes) => (axes ? axes.split(",") : []));
}

/** In how many parts an axis is cut that some mesh axes split. */
export function ways(names, server) {
  return names.reduce((product, name) => product * sizeOf(name, server), 1);
}

/** Which of its parts a device holds. */
export function partOf(names, device, server) {
  return names.reduce((index, name) => index * sizeOf(name, server) + device.at[name], 0);
}

/** What a device holds of a parameter, axis by axis: from where to where. */
export function sliceOf(parameter, device, server) {
  return splits(parameter).map((names, axis) => {
    const size = Number(parameter.shape[axis]) / ways(names, server);
    const start = partOf(names, device, server) * size;
    return [start, start + size];
  });
}

/** A slice as Python writes it; ":" is the whole of an axis. */
export function sliceText(slice, parameter) {
  const axes = slice.map(([start, end], axis) =>
    end - start === Number(parameter.shape[axis]) ? ":" : `${start}:${end}`);
  return `[${axes.join(", ")}]`;
}

/** Bytes of a parameter in all. */
export function parameterBytes(parameter) {
  const items = parameter.shape.reduce((product, size) => product * Number(size), 1);
  return items * ITEM_BYTES[parameter.dtype];
}

/** Bytes of a parameter on each device. */
export function deviceBytes(parameter, server) {
  return parameterBytes(parameter) / splits(parameter).reduce((n, x) => n * ways(x, server), 1);
}

function sizeOf(name, server) {
  return server.mesh.find((axis) => axis.name === name)?.size ?? 1;
}
