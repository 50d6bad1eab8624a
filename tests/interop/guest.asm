; Tiny self-checking guest for live-migration tests.  512-byte boot sector.
;
;   nasm -f bin -DDIRTY_START=0x100000 -DDIRTY_END=0x3000000 \
;           -o guest.img guest.asm
;
; 1. fills [FILL_START, FILL_END) once, dword by dword, with a pseudo-random
;    sequence (x = x*1664525 + 1013904223, first x = SEED), so its expected
;    content is known outside (guest.py, Guest.fill_pattern) and incompressible;
; 2. prints 'R', then for ever:
;      for each 4 KiB page in [DIRTY_START, DIRTY_END):
;          byte at offset 0 must equal the pass number (mod 256), else print '!'
;          and stop; then increment it;
;      if VERIFY: re-run the fill generator, comparing one dword per page
;          (offset 0) with the same generator jumped 1024 steps, else '!';
;      print a letter, 'a' + pass mod 26;
;      halt for TICKS timer interrupts (PIT channel 0 at 200 Hz, through the 8259),
;          so the migrated device state must be right for the guest to go on.
;    The letters go round a..z with no gap, so the source's serial log followed by
;    the destination's must be one unbroken sequence: nothing lost, nothing replayed.
        bits 16
        org 0x7c00

%ifndef FLUSH
%define FLUSH 1
%endif
%ifndef SEED
%define SEED 0x12345678
%endif

start:  cli
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x7000
        in al, 0x92             ; fast A20
        or al, 2
        and al, 0xfe
        out 0x92, al
        mov dx, 0x3f9           ; UART: no interrupts
        xor al, al
        out dx, al
        lgdt [gdtr]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        jmp 0x08:pm

        bits 32
pm:     mov ax, 0x10
        mov ds, ax
        mov es, ax
        mov ss, ax
        mov esp, 0x7000

        ; ---- timer: IDT at 0x1000, IRQ0 is vector 8 (the BIOS's PIC setting)
        mov dword [0x1000 + 8*8], 0x00080000 + (irq0 - $$) + 0x7c00
        mov dword [0x1004 + 8*8], 0x00008e00
        lidt [idtr]
        mov al, 0xfe            ; only IRQ0
        out 0x21, al
        mov al, 0x34            ; channel 0, lo/hi, mode 2
        out 0x43, al
        mov al, (1193182 / 200) & 0xff
        out 0x40, al
        mov al, (1193182 / 200) >> 8
        out 0x40, al

        ; ---- fill
        mov edi, FILL_START
        mov eax, SEED
.fill:  cmp edi, FILL_END
        jae .filled
        mov [edi], eax
        imul eax, eax, 1664525
        add eax, 1013904223
        add edi, 4
        jmp .fill
.filled:
        mov edi, DIRTY_START    ; SeaBIOS may have used this memory: start from 0
.zero:  cmp edi, DIRTY_END
        jae .zeroed
        mov byte [edi], 0
        add edi, 4096
        jmp .zero
.zeroed:
        mov al, 'R'
        call putc
        xor ebx, ebx            ; pass number
pass:
        call flush
        mov edi, DIRTY_START
.page:  cmp edi, DIRTY_END
        jae .done
        cmp [edi], bl
        jne fail
        inc byte [edi]
        add edi, 4096
        jmp .page
.done:
%if VERIFY
        ; compare every page's first dword with the generator jumped 1024 steps:
        ; x_{n+1024} = x_n * A + C (mod 2^32), A, C computed here once at build
        mov edi, FILL_START
        mov eax, SEED
.ver:   cmp edi, FILL_END
        jae .verok
        cmp [edi], eax
        jne fail
        imul eax, eax, JUMP_A
        add eax, JUMP_C
        add edi, 4096
        jmp .ver
.verok:
%endif
        mov eax, ebx
        xor edx, edx
        mov ecx, 26
        div ecx
        mov al, dl
        add al, 'a'
        call putc
        inc ebx
%if TICKS
        mov ecx, TICKS
.wait:  sti
        hlt
        loop .wait
        cli
%endif
        jmp pass

irq0:   push eax
        call flush
        mov al, 0x20
        out 0x20, al
        pop eax
        iret

fail:   push edi
        mov al, '!'
        call putc
        pop eax                 ; print the failing address in hex
        mov ecx, 8
.hex:   rol eax, 4
        push eax
        and al, 15
        add al, '0'
        cmp al, '9'
        jbe .d
        add al, 7
.d:     call putc
        pop eax
        loop .hex
.hang:  hlt
        jmp .hang

; TCG before QEMU 9.0 forgets to reset its TLB when migration clears dirty bits
; (fixed by "physmem: Fix migration dirty bitmap coherency with TCG memory access"),
; so a page written again through a still-writable TLB entry is lost by precopy.
; Changing CR0.WP makes TCG drop its whole TLB; harmless elsewhere.
flush:
%if FLUSH
        push eax
        mov eax, cr0
        xor eax, 0x10000
        mov cr0, eax
        pop eax
%endif
        ret

putc:   mov ah, al
        mov dx, 0x3fd
.w:     in al, dx
        test al, 0x20
        jz .w
        mov al, ah
        mov dx, 0x3f8
        out dx, al
        ret

        align 8
gdt:    dq 0
        dq 0x00cf9a000000ffff   ; code, flat
        dq 0x00cf92000000ffff   ; data, flat
gdtr:   dw gdtr - gdt - 1
        dd gdt
idtr:   dw 9*8 - 1
        dd 0x1000

        times 510 - ($ - $$) db 0
        dw 0xaa55
        times 1474560 - ($ - $$) db 0
