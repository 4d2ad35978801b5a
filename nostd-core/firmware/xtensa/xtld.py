#!/usr/bin/env python3
"""xtld - a small static linker for Xtensa objects made by upstream LLVM (as in rustc 1.95 and later).

Why it exists.  GNU ld for Xtensa on Debian (binutils-xtensa-lx106) only knows the ESP8266's
instruction set, ld.lld has no Xtensa port, and LLVM 22's Xtensa *object* writer has a flaw that no
ordinary linker can mend: it writes a function's literals (the 32-bit words that l32r loads) at the
end of the *preceding* function's section, without aligning them, while l32r can only load from
4-aligned addresses ("dangerous relocation: l32r: misaligned literal target").  This linker does not
use the literals where they lie: for every l32r it copies the literal into an aligned pool in front
of the code that uses it.  That also makes dead-code removal exact, since a literal then keeps
alive only what the function that loads it refers to.

What it does: reads ELF32 little-endian Xtensa relocatable objects and ar archives (.rlib/.a),
resolves symbols (archive members only when needed), removes unreachable sections, lays everything
out in one RWX segment, applies R_XTENSA_32 / R_XTENSA_SLOT0_OP, writes an ELF executable with a
symbol table (so `qemu -d in_asm`, llvm-objdump and gdb show names).

Use it as rustc's linker: in the target JSON, "linker-flavor": "gnu", "linker": "<path>/xtld.py".
Options it understands (all others that rustc passes are ignored):
  FILE...          objects and archives          -o OUT       output
  --entry=SYM      entry symbol (_start)         --base=ADDR  load address (0x60000000)
  --stack=BYTES    stack size (262144)           --ram=BYTES  fail when code+data+stack exceed it
  --map=FILE       write a map of what was linked
  --reset=ADDR     also put a jump to the entry at ADDR (QEMU's `sim` machine starts the CPU at its
                   reset vector whatever the ELF entry is: 0xfe000000 for dc232b, dc233c and
                   de233_fpu; 0x50000000 for lx106, de212 and sample_controller)
Symbols it defines: _bss_start, _bss_end, _stack_bottom, _stack_top, _image_end.
"""
import os
import struct
import sys

from elf import (R_32, R_ASM_EXPAND, R_NONE, R_SLOT0, SHF_EXEC, SHF_WRITE, SHT_NOBITS, STB_GLOBAL, STB_LOCAL,
                 STB_WEAK, Obj, die, members)


class Linker:
    def __init__(self, entry):
        self.objs, self.lazy, self.globals, self.want = [], {}, {}, [entry]
        self.entry, self.special = entry, {}

    def add_file(self, path):
        b = open(path, "rb").read()
        if b[:8] == b"!<arch>\n":
            for name, body in members(path, b):
                o = Obj(name, body)
                for s in o.syms:
                    if s[3] != STB_LOCAL and s[2] != 0 and s[0]:
                        self.lazy.setdefault(s[0], o)
        elif b[:4] == b"\x7fELF":
            self.add_obj(Obj(path, b))
        else:
            die(f"{path}: neither an archive nor an ELF object")

    def add_obj(self, o):
        if o in self.objs:
            return
        self.objs.append(o)
        for i, (name, _v, si, bind, _t, _s) in enumerate(o.syms):
            if bind == STB_LOCAL or not name:
                continue
            if si == 0:
                if bind != STB_WEAK:
                    self.want.append(name)
                continue
            old = self.globals.get(name)
            if old is None or old[2] == STB_WEAK and bind == STB_GLOBAL:
                self.globals[name] = (o, i, bind)
            elif old[2] == STB_GLOBAL and bind == STB_GLOBAL:
                die(f"duplicate symbol {name}: {old[0].name} and {o.name}")

    def pull(self):
        while self.want:
            n = self.want.pop()
            if n not in self.globals and n in self.lazy:
                self.add_obj(self.lazy[n])

    def resolve(self, o, symi):
        """-> (section or None, offset or absolute value, name)"""
        name, val, si, bind, typ, _sz = o.syms[symi]
        if bind != STB_LOCAL and name in self.globals:
            o, symi, _ = self.globals[name]
            name, val, si, bind, typ, _sz = o.syms[symi]
        if si == 0:
            if name in self.special or bind == STB_WEAK:
                return None, self.special.get(name, 0), name
            return None, None, name
        if si == 0xfff1:
            return None, val, name
        if si >= len(o.secs):
            die(f"{o.name}: symbol {name} in unsupported section index {si:#x}")
        return o.secs[si], val, name or o.secs[si].name

    def is_l32r(self, s, off):
        return s.data[off] & 15 == 1

    def literal(self, s, r):
        """Key of the literal which the l32r at relocation r loads: ('sym', sec, off) or ('abs', v)."""
        t, v, name = self.resolve(s.obj, r[2])
        if t is None:
            die(f"{s.obj.name}:{s.name}+{r[0]:#x}: l32r from undefined literal {name}")
        o = v + r[3]
        word = struct.unpack_from("<I", t.data, o)[0]
        lr = t.rel_at.get(o)
        if lr is None:
            return ("abs", word)
        ts, tv, tn = self.resolve(t.obj, lr[2])
        if ts is None and tn in self.special:
            return ("special", tn, lr[3] + word)
        if ts is None:
            if tv is None:
                return ("undef", tn, 0)
            return ("abs", (tv + lr[3] + word) & 0xffffffff)
        return ("sec", ts, tv + lr[3] + word)

    def mark(self):
        """Reachability from the entry; fills every code section's literal pool."""
        undefined = {}
        if self.entry not in self.globals:
            die(f"no entry symbol {self.entry}")
        todo = [self.resolve(*self.globals[self.entry][:2])[0]]
        # sections that must stay wherever they are (exception vectors)
        todo += [s for o in self.objs for s in o.secs if s.name.startswith(".vectors")]
        order = []
        while todo:
            s = todo.pop()
            if s.live:
                continue
            s.live = True
            order.append(s)
            code = s.flags & SHF_EXEC
            for r in s.rel:
                if r[1] in (R_NONE, R_ASM_EXPAND) or 17 <= r[1] <= 19 or 57 <= r[1] <= 62:
                    continue
                if r[1] == R_SLOT0 and self.is_l32r(s, r[0]):
                    k = self.literal(s, r)
                    s.pool.setdefault(k, 0)
                    if k[0] == "undef":
                        undefined.setdefault(k[1], f"{s.obj.name}:{s.name}")
                    elif k[0] == "sec":
                        todo.append(k[1])
                    continue
                if r[1] == R_32 and code and not s.name.startswith((".text.start", ".vectors")):
                    continue        # a literal: reached through its l32r, copied into a pool
                t, v, name = self.resolve(s.obj, r[2])
                if t is not None:
                    todo.append(t)
                elif v is None:
                    undefined.setdefault(name, f"{s.obj.name}:{s.name}")
        if undefined:
            die("undefined symbols:\n" + "\n".join(f"  {n} (from {w})" for n, w in sorted(undefined.items())))
        return order

    def layout(self, order, base, stack):
        def kind(s):
            if s.name.startswith(".vectors"):
                return 0
            if s.flags & SHF_EXEC:
                return 1
            if s.type == SHT_NOBITS:
                return 4
            return 3 if s.flags & SHF_WRITE else 2
        order.sort(key=kind)                      # stable: keeps the order of discovery
        at = base
        self.sizes = [0] * 5
        bss0 = None
        for s in order:
            k, a0 = kind(s), at
            if k == 0 and s.pool:
                die(f"{s.name}: l32r in a vector section")
            if k == 4 and bss0 is None:
                at = (at + 15) & -16
                bss0 = at
            if k == 1:
                at = (at + 3) & -4
                s.pool_addr = at
                s.pool_keys = list(s.pool)
                for i, key in enumerate(s.pool_keys):
                    s.pool[key] = at + 4 * i
                at += 4 * len(s.pool)
            al = max(s.align, 4)
            at = (at + al - 1) & -al
            s.addr = at
            at += s.size
            self.sizes[k] += at - a0
        at = (at + 15) & -16
        if bss0 is None:
            bss0 = at
        self.image_end = bss0
        self.special.update(_bss_start=bss0, _bss_end=at, _stack_bottom=at, _stack_top=at + stack,
                            _image_end=bss0)
        return at + stack

    def value(self, k):
        if k[0] == "abs":
            return k[1]
        if k[0] == "special":
            return (self.special[k[1]] + k[2]) & 0xffffffff
        return (k[1].addr + k[2]) & 0xffffffff

    def apply(self, s):
        d = bytearray(s.data)
        for r in s.rel:
            off, typ, symi, add = r
            if typ in (R_NONE, R_ASM_EXPAND) or 17 <= typ <= 19 or 57 <= typ <= 62:
                continue
            where = f"{s.obj.name}:{s.name}+{off:#x}"
            pc = s.addr + off
            if typ == R_SLOT0 and self.is_l32r(s, off):
                tgt = s.pool[self.literal(s, r)]
                v = (tgt - ((pc + 3) & -4)) >> 2
                if not -65536 <= v < 0:
                    die(f"{where}: l32r out of range (function larger than 256 KiB?)")
                d[off + 1:off + 3] = struct.pack("<H", v & 0xffff)
                continue
            t, v, name = self.resolve(s.obj, symi)
            if t is None and v is None:
                if typ == R_32 and s.flags & SHF_EXEC:
                    continue                      # literal of a removed function
                die(f"{where}: undefined {name}")
            if t is not None and not t.live:
                if typ == R_32 and s.flags & SHF_EXEC:
                    continue
                die(f"{where}: refers to removed {t.name}")
            val = (t.addr if t else 0) + v + add
            if typ == R_32:
                w = struct.unpack_from("<I", d, off)[0]
                struct.pack_into("<I", d, off, (w + val) & 0xffffffff)
            elif typ == R_SLOT0:
                self.slot0(d, off, pc, val, where)
            else:
                die(f"{where}: relocation type {typ} is not supported")
        return bytes(d)

    def slot0(self, d, off, pc, tgt, where):
        """Put a PC-relative target into a call, jump or branch (24-bit or narrow) instruction."""
        def fit(v, lo, hi):
            if not lo <= v <= hi:
                die(f"{where}: branch target out of range ({v})")
            return v
        op0 = d[off] & 15
        if op0 == 12:                             # beqz.n / bnez.n
            w = d[off] | d[off + 1] << 8
            v = fit(tgt - (pc + 4), 0, 63)
            w = w & 0x0fcf | (v & 15) << 12 | (v >> 4) << 4
            d[off], d[off + 1] = w & 255, w >> 8
            return
        w = d[off] | d[off + 1] << 8 | d[off + 2] << 16
        n, m, r = w >> 4 & 3, w >> 6 & 3, w >> 12 & 15
        rel = tgt - (pc + 4)
        if op0 == 5:                              # call0/4/8/12
            if tgt & 3:
                die(f"{where}: call target not 4-aligned")
            v = fit((tgt - ((pc & -4) + 4)) >> 2, -(1 << 17), (1 << 17) - 1)
            w = w & 0x3f | (v & 0x3ffff) << 6
        elif op0 == 6 and n == 0:                 # j
            w = w & 0x3f | (fit(rel, -(1 << 17), (1 << 17) - 1) & 0x3ffff) << 6
        elif op0 == 6 and n == 1:                 # beqz bnez bltz bgez
            w = w & 0xfff | (fit(rel, -2048, 2047) & 0xfff) << 12
        elif op0 == 6 and n == 3 and m == 1 and r in (8, 9, 10):   # loop loopnez loopgtz
            w = w & 0xffff | fit(rel, 0, 255) << 16
        elif op0 == 6 and n == 3 and m == 0:
            die(f"{where}: relocation on entry")
        elif op0 in (6, 7):                       # all other branches
            w = w & 0xffff | (fit(rel, -128, 127) & 0xff) << 16
        else:
            die(f"{where}: cannot relocate instruction {w:06x}")
        d[off:off + 3] = bytes((w & 255, w >> 8 & 255, w >> 16))


def main(argv):
    out, files, entry, base, stack, ram, mapf, reset = "a.out", [], "_start", 0x60000000, 262144, None, None, None
    it = iter(argv)
    for a in it:
        if a.startswith("@"):
            argv2 = open(a[1:]).read().split("\n")
            return main([x.strip().strip('"') for x in argv2 if x.strip()])
        if a == "-o":
            out = next(it)
        elif a in ("-L", "-z", "-m", "-T", "-plugin", "-l", "-e", "-h", "-soname", "-rpath"):
            next(it)
        elif a.startswith("--entry="):
            entry = a[8:]
        elif a.startswith("--base="):
            base = int(a[7:], 0)
        elif a.startswith("--stack="):
            stack = int(a[8:], 0)
        elif a.startswith("--ram="):
            ram = int(a[6:], 0)
        elif a.startswith("--map="):
            mapf = a[6:]
        elif a.startswith("--reset="):
            reset = int(a[8:], 0)
        elif not a.startswith("-"):
            files.append(a)
    ld = Linker(entry)
    for n in ("_bss_start", "_bss_end", "_stack_bottom", "_stack_top", "_image_end"):
        ld.special[n] = 0
    for f in files:
        ld.add_file(f)
    ld.pull()
    order = ld.mark()
    end = ld.layout(order, base, stack)
    if ram is not None and end - base > ram:
        die(f"image + stack need {end - base} bytes, --ram allows {ram}")
    img = bytearray(ld.image_end - base)
    for s in order:
        for i, k in enumerate(s.pool_keys):
            struct.pack_into("<I", img, s.pool_addr - base + 4 * i, ld.value(k))
        if s.type != SHT_NOBITS:
            d = ld.apply(s)
            img[s.addr - base:s.addr - base + len(d)] = d
    es, ev, _ = ld.resolve(*ld.globals[entry][:2])
    # symbol table
    strtab, syms = bytearray(b"\0"), [struct.pack("<IIIBBH", 0, 0, 0, 0, 0, 0)]
    for o in ld.objs:
        for name, val, si, bind, typ, sz in o.syms:
            if si and si < len(o.secs) and o.secs[si].live and name and typ != 3 and not name.startswith(".L"):
                syms.append(struct.pack("<IIIBBH", len(strtab), o.secs[si].addr + val, sz, STB_GLOBAL << 4 | typ, 0, 1))
                strtab += name.encode() + b"\0"
    shstr = b"\0.image\0.symtab\0.strtab\0.shstrtab\0"
    hdr = 0x1000
    if reset is not None:       # j .+8 ; literal: entry ; l32r a0, literal ; jx a0
        stub = b"\x06\x01\x00\x00" + struct.pack("<I", es.addr + ev) + b"\x01\xff\xff\xa0\x00\x00"
    symb = b"".join(syms)
    o1 = hdr + len(img)
    o1 += -o1 % 4
    o2 = o1 + len(symb)
    o3 = o2 + len(strtab)
    o4 = o3 + len(shstr)
    o4 += -o4 % 4
    bss = ld.special["_bss_end"] - base
    elf = bytearray(o4)
    struct.pack_into("<16sHHIIIIIHHHHHH", elf, 0, b"\x7fELF\x01\x01\x01", 2, 94, 1, es.addr + ev, 52, o4, 0x300, 52, 32,
                     1 + (reset is not None), 40, 5, 4)
    struct.pack_into("<8I", elf, 52, 1, hdr, base, base, len(img), bss, 7, 0x1000)
    if reset is not None:
        struct.pack_into("<8I", elf, 84, 1, 0x800, reset, reset, len(stub), len(stub), 5, 4)
        elf[0x800:0x800 + len(stub)] = stub
    elf[hdr:hdr + len(img)] = img
    elf[o1:o1 + len(symb)], elf[o2:o2 + len(strtab)], elf[o3:o3 + len(shstr)] = symb, strtab, shstr
    for h in ((0,) * 10, (1, 1, 7, base, hdr, len(img), 0, 0, 16, 0), (8, 2, 0, 0, o1, len(symb), 3, 1, 4, 16),
              (16, 3, 0, 0, o2, len(strtab), 0, 0, 1, 0), (24, 3, 0, 0, o3, len(shstr), 0, 0, 1, 0)):
        elf += struct.pack("<10I", *h)
    with open(out, "wb") as f:
        f.write(elf)
    os.chmod(out, 0o755)
    v, c, ro, rw, bs = ld.sizes
    line = f"vectors {v} code {c} rodata {ro} data {rw} bss {bs} stack {stack} total {end - base} bytes"
    if mapf:
        with open(mapf, "w") as f:
            f.write(line + "\n")
            for s in order:
                f.write(f"{s.addr:08x} {s.size:7d} pool {len(s.pool):4d} {s.name}  {s.obj.name.rsplit('/', 1)[-1]}\n")
    sys.stderr.write("xtld: " + line + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
