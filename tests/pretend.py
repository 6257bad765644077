"""A GPU on a machine that has none: tensors that say they are on one, and refuse to meet tensors that are not.

The numbers stay in main memory. What is watched is what a real GPU would refuse: operations on tensors of two
devices, a GPU's index into a CPU's tensor, `.numpy()` of a GPU's tensor. And it counts how often the host would
have to wait for the GPU, because a number or a size is asked for."""
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CPU, GPU, T = torch.device("cpu"), torch.device("cuda:0"), torch.Tensor
CROSSING = (T.copy_, T.data.__set__, T.__deepcopy__, torch._has_compatible_shallow_copy_type) # between devices
INDEXING = (T.__getitem__, T.__setitem__, T.index_put_) # by indices of a CPU too
WAITING = (T.item, T.tolist, T.__bool__, T.__int__, T.__float__, T.__index__, T.nonzero, T.unique, T.masked_select, T.repeat_interleave, T.bincount,
           torch.nonzero, torch.unique, torch.masked_select, torch.repeat_interleave, torch.bincount, torch.equal)


def on_gpu(x):
    return getattr(x, "pretends", False)


def marked(x, gpu):
    x.pretends = gpu
    return x


class PretendedGPU(TorchFunctionMode):
    "Inside, device='cuda' gives tensors that pretend to be there"
    def __enter__(self):
        self.waits = 0
        self.patches = [patch("torch.cuda.get_device_name", lambda device: "a pretended GPU"), patch("torch.cuda.mem_get_info", lambda device: (2**40, 2**40)),
                        patch("torch.cuda.get_rng_state", lambda device: torch.get_rng_state()), patch("torch.cuda.set_rng_state", lambda state, device: None)]
        for p in self.patches: p.start()
        return super().__enter__()

    def __exit__(self, *error):
        for p in self.patches: p.stop()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == T.device.__get__: return GPU if on_gpu(args[0]) else CPU
        if func == T.is_cuda.__get__: return on_gpu(args[0])
        if func == T.data.__set__: marked(args[0], on_gpu(args[1]))
        if func is T.to or func is torch.as_tensor and torch.is_tensor(args[0]): return self.moved(*args, **kwargs)
        if func is T.cpu: return self.moved(args[0], CPU)
        if func is T.numpy and on_gpu(args[0]): raise TypeError("a GPU's tensor has no numpy array: use .cpu()")
        tensors = [x for x in tree_flatten((args, kwargs))[0] if torch.is_tensor(x)]
        where = kwargs.get("device")
        if where is not None: kwargs["device"] = CPU
        if func not in CROSSING: self.check(func, tensors)
        if func is T.__deepcopy__: tensors = tensors[:1]
        gpu = any(map(on_gpu, tensors)) if where is None else torch.device(where).type == "cuda"
        self.waits += gpu and func in WAITING
        return tree_map(lambda x: marked(x, gpu) if torch.is_tensor(x) and all(x is not t for t in tensors) else x, func(*args, **kwargs))

    def check(self, func, tensors):
        if func in INDEXING and on_gpu(tensors[0]): return
        if len({on_gpu(x) for x in tensors if x.ndim or on_gpu(x)}) > 1: raise RuntimeError(f"{getattr(func, '__name__', func)} of tensors on two devices")

    def moved(self, x, *args, **kwargs):
        words = [*args, *kwargs.values()]
        where = [torch.device(w) for w in words if isinstance(w, (str, torch.device))] + [GPU if on_gpu(w) else CPU for w in words if torch.is_tensor(w)]
        dtype = [w for w in words if isinstance(w, torch.dtype)] + [w.dtype for w in words if torch.is_tensor(w)]
        gpu = where[0].type == "cuda" if where else on_gpu(x)
        self.waits += on_gpu(x) and not gpu
        new = x.to(dtype[0]) if dtype else x
        if new is x and (gpu != on_gpu(x) or kwargs.get("copy")): new = x.clone()
        return new if new is x else marked(new, gpu)
