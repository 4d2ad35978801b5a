# Start-up code for a bare-metal Xtensa program under `qemu-system-xtensa -M sim -semihosting`.
# Assemble with LLVM:  llvm-mc-22 -triple=xtensa-none-elf -mattr=+windowed,+density,... \
#     --defsym WINDOWED=0|1 --defsym FPU=0|1 -filetype=obj start.S -o start.o
# (simcall has no mnemonic in LLVM 22, so it is written as its three bytes 00 51 00.)
#
# Gives the Rust side:   i32  sys_write(i32 fd, const u8 *p, usize n);
#                        void sys_exit(i32 code);          (never returns)
#                        u32  cycles(void);
#                        u32  cycle_ns(void);          (nanoseconds per cycle)
#                        void abort(void);                 (what LLVM lowers traps to; exit code 99)
# and calls:             i32  rust_main(void);             its result is QEMU's exit code
# An exception (bad address, unaligned access, illegal instruction, coprocessor off) prints
# "XTENSA EXCEPTION cause=........ pc=........ vaddr=........" and exits with code 97.

        .macro  simcall
        .byte   0x00, 0x51, 0x00
        .endm

# ---------------------------------------------------------------- vectors (VECBASE points here)
        .section .vectors, "ax", @progbits
        .p2align 12
        .global _vectors
_vectors:
.if WINDOWED
# Register-window spill and fill, the sequences which the ISA prescribes, 64 bytes apart.
        s32e    a0, a5, -16             # 0x000 overflow 4
        s32e    a1, a5, -12
        s32e    a2, a5, -8
        s32e    a3, a5, -4
        rfwo
        .org    0x40
        l32e    a0, a5, -16             # 0x040 underflow 4
        l32e    a1, a5, -12
        l32e    a2, a5, -8
        l32e    a3, a5, -4
        rfwu
        .org    0x80
        s32e    a0, a9, -16             # 0x080 overflow 8
        l32e    a0, a1, -12
        s32e    a1, a9, -12
        s32e    a2, a9, -8
        s32e    a3, a9, -4
        s32e    a4, a0, -32
        s32e    a5, a0, -28
        s32e    a6, a0, -24
        s32e    a7, a0, -20
        rfwo
        .org    0xc0
        l32e    a0, a9, -16             # 0x0c0 underflow 8
        l32e    a1, a9, -12
        l32e    a2, a9, -8
        l32e    a7, a1, -12
        l32e    a3, a9, -4
        l32e    a4, a7, -32
        l32e    a5, a7, -28
        l32e    a6, a7, -24
        l32e    a7, a7, -20
        rfwu
        .org    0x100
        s32e    a0, a13, -16            # 0x100 overflow 12
        l32e    a0, a1, -12
        s32e    a1, a13, -12
        s32e    a2, a13, -8
        s32e    a3, a13, -4
        s32e    a4, a0, -48
        s32e    a5, a0, -44
        s32e    a6, a0, -40
        s32e    a7, a0, -36
        s32e    a8, a0, -32
        s32e    a9, a0, -28
        s32e    a10, a0, -24
        s32e    a11, a0, -20
        rfwo
        .org    0x140
        l32e    a0, a13, -16            # 0x140 underflow 12
        l32e    a1, a13, -12
        l32e    a2, a13, -8
        l32e    a11, a1, -12
        l32e    a3, a13, -4
        l32e    a4, a11, -48
        l32e    a5, a11, -44
        l32e    a6, a11, -40
        l32e    a7, a11, -36
        l32e    a8, a11, -32
        l32e    a9, a11, -28
        l32e    a10, a11, -24
        l32e    a11, a11, -20
        rfwu
.endif
        .irp    at, 0x180, 0x1c0, 0x200, 0x240, 0x280, 0x2c0, 0x300, 0x340, 0x380, 0x3c0
        .org    \at                     # interrupts 0x180.., kernel 0x300, user 0x340, double 0x3c0
        j       _exception
        .endr
        .org    0x400

# ---------------------------------------------------------------- reset
        .section .text.start, "ax", @progbits
        .p2align 2
L_stack:        .long   _stack_top
L_bss0:         .long   _bss_start
L_bss1:         .long   _bss_end
L_stack0:       .long   _stack_bottom
L_paint:        .long   0xA5A5A5A5
L_vec:          .long   _vectors
L_msg:          .long   _exc_msg
L_ps:           .long   0x4002f         # WOE=1, UM=1, EXCM=0, INTLEVEL=15
        .global _start
        .p2align 2
_start:
.if WINDOWED
        movi    a2, 1                   # only the current window is live
        wsr     a2, windowstart
        movi    a2, 0
        wsr     a2, windowbase
        rsync
.endif
        l32r    a2, L_vec
        wsr     a2, vecbase
        l32r    a2, L_ps
        wsr     a2, ps
        rsync
        movi    a2, 0x2a                # s32c1i on any kind of memory: let the core itself do it
        wsr     a2, atomctl
        movi    a0, 0
        l32r    a1, L_stack
        l32r    a2, L_bss0
        l32r    a3, L_bss1
1:      bgeu    a2, a3, 2f
        s32i    a0, a2, 0
        addi    a2, a2, 4
        j       1b
2:
        l32r    a2, L_stack0            # fill the stack: how deep it gets can be seen at the end
        l32r    a3, L_paint
12:     bgeu    a2, a1, 13f
        s32i    a3, a2, 0
        addi    a2, a2, 4
        j       12b
13:
.if FPU
        movi    a2, 255
        wsr     a2, cpenable            # switch the coprocessors (the FPU) on
        rsync
.endif
.if WINDOWED
        mov     a2, a1                  # a frame above the first one, for its spill area
        addi    a1, a1, -64
        addi    a3, a1, -12
        s32i    a2, a3, 0
        call8   rust_main
        mov     a3, a10
.else
        call0   rust_main
        mov     a3, a2
.endif
        movi    a2, 1                   # exit(rust_main())
        simcall
3:      j       3b

# ---------------------------------------------------------------- host calls
        .global sys_exit
        .p2align 2
sys_exit:
.if WINDOWED
        entry   a1, 32
.endif
        mov     a3, a2
        movi    a2, 1
        simcall
4:      j       4b

        .global sys_write
        .p2align 2
sys_write:
.if WINDOWED
        entry   a1, 32
.endif
        mov     a5, a4
        mov     a4, a3
        mov     a3, a2
        movi    a2, 4
        simcall
.if WINDOWED
        retw
.else
        ret
.endif

        .global cycles                  # u32 cycles(void)
        .p2align 2
cycles:
.if WINDOWED
        entry   a1, 32
.endif
        rsr     a2, ccount
.if WINDOWED
        retw
.else
        ret
.endif

        .global cycle_ns                # u32 cycle_ns(void): dc233c runs at 10 MHz, de233_fpu at 40
        .p2align 2
cycle_ns:
.if WINDOWED
        entry   a1, 32
.endif
.if FPU
        movi    a2, 25
.else
        movi    a2, 100
.endif
.if WINDOWED
        retw
.else
        ret
.endif

        .global abort
        .p2align 2
abort:
        movi    a3, 99
        movi    a2, 1
        simcall
5:      j       5b

# ---------------------------------------------------------------- an exception: tell and exit(97)
        .p2align 2
_exception:
        l32r    a7, L_msg
        rsr     a8, exccause
        addi    a9, a7, 23
        movi    a13, 0
6:      movi    a10, 28                 # eight hex digits of a8 to a9
7:      ssr     a10
        srl     a11, a8
        movi    a12, 15
        and     a11, a11, a12
        addi    a12, a11, 48
        blti    a11, 10, 8f
        addi    a12, a11, 87
8:      s8i     a12, a9, 0
        addi    a9, a9, 1
        addi    a10, a10, -4
        bgez    a10, 7b
        addi    a13, a13, 1
        bnei    a13, 1, 9f
        rsr     a8, epc1
        addi    a9, a7, 35
        j       6b
9:      bnei    a13, 2, 10f
        rsr     a8, excvaddr
        addi    a9, a7, 50
        j       6b
10:     mov     a4, a7
        movi    a5, 59
        movi    a3, 2
        movi    a2, 4
        simcall
        movi    a3, 97
        movi    a2, 1
        simcall
11:     j       11b

        .section .data._exc_msg, "aw", @progbits
_exc_msg:
        .ascii  "XTENSA EXCEPTION cause=........ pc=........ vaddr=........\n"
