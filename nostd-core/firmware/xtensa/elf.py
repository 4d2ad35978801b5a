"""Reading ELF32 little-endian Xtensa objects and ar archives, for xtld.py."""
import struct
import sys

R_NONE, R_32, R_ASM_EXPAND, R_SLOT0 = 0, 1, 11, 20
SHF_WRITE, SHF_ALLOC, SHF_EXEC = 1, 2, 4
SHT_PROGBITS, SHT_SYMTAB, SHT_RELA, SHT_NOBITS = 1, 2, 4, 8
STB_LOCAL, STB_GLOBAL, STB_WEAK = 0, 1, 2


def die(msg):
    sys.exit("xtld: error: " + msg)


class Sec:
    __slots__ = ("obj", "name", "type", "flags", "align", "data", "size", "rel", "rel_at",
                 "addr", "live", "pool", "pool_addr", "pool_keys")

    def __init__(self, obj, name, typ, flags, align, data, size):
        self.obj, self.name, self.type, self.flags = obj, name, typ, flags
        self.align, self.data, self.size = max(align, 1), data, size
        self.rel, self.rel_at = [], {}
        self.addr, self.live = None, False
        self.pool, self.pool_addr, self.pool_keys = {}, None, []


class Obj:
    """One relocatable file: sections, symbols (name, value, secindex, bind, type, size)."""

    def __init__(self, name, b):
        self.name = name
        if b[:6] != b"\x7fELF\x01\x01" or struct.unpack_from("<H", b, 18)[0] != 94:
            die(f"{name}: not a little-endian ELF32 Xtensa object")
        shoff, = struct.unpack_from("<I", b, 32)
        shentsize, shnum, shstr = struct.unpack_from("<HHH", b, 46)
        if shnum == 0:      # more than 0xff00 sections
            shnum = struct.unpack_from("<I", b, shoff + 20)[0]
        if shstr == 0xffff:
            shstr = struct.unpack_from("<I", b, shoff + 24)[0]
        hdr = [struct.unpack_from("<10I", b, shoff + i * shentsize) for i in range(shnum)]

        def cstr(tab, off):
            s = hdr[tab][4] + off
            return b[s:b.index(0, s)].decode()
        self.secs, self.syms, shndx = [], [], None
        for h in hdr:
            name_, typ, flags, _a, off, size, _l, _i, align, _e = h
            data = b"" if typ == SHT_NOBITS else b[off:off + size]
            self.secs.append(Sec(self, cstr(shstr, name_), typ, flags, align, data, size))
            if typ == 18:   # SHT_SYMTAB_SHNDX
                shndx = data
        for i, h in enumerate(hdr):
            if h[1] == SHT_SYMTAB:
                for k in range(h[5] // 16):
                    n, val, sz, info, _o, si = struct.unpack_from("<IIIBBH", b, h[4] + 16 * k)
                    if si == 0xffff and shndx:
                        si = struct.unpack_from("<I", shndx, 4 * k)[0]
                    self.syms.append((cstr(h[6], n), val, si, info >> 4, info & 15, sz))
        for i, h in enumerate(hdr):
            if h[1] == SHT_RELA:
                t = self.secs[h[7]]
                for k in range(h[5] // 12):
                    off, info, add = struct.unpack_from("<IIi", b, h[4] + 12 * k)
                    r = (off, info & 255, info >> 8, add)
                    t.rel.append(r)
                    if r[1] == R_32:
                        t.rel_at[off] = r


def members(path, b):
    """(name, bytes) of each ELF member of an ar archive."""
    pos, longnames = 8, b""
    while pos + 60 <= len(b):
        n = b[pos:pos + 16].decode().rstrip()
        size = int(b[pos + 48:pos + 58])
        body = b[pos + 60:pos + 60 + size]
        if n.startswith("#1/"):
            k = int(n[3:])
            n, body = body[:k].rstrip(b"\0").decode(), body[k:]
        elif n == "//":
            longnames = body
        elif n[:1] == "/" and n[1:].isdigit():
            s = int(n[1:])
            n = longnames[s:longnames.index(b"\n", s)].rstrip(b"/").decode()
        else:
            n = n.rstrip("/")
        # rustc's lib.rmeta is an ELF file too, but holds no code
        if body[:4] == b"\x7fELF" and n != "lib.rmeta":
            yield f"{path}({n})", body
        pos += 60 + size + (size & 1)
