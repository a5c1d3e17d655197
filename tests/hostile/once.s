# A multiboot kernel that resets its machine once, and then writes 5 to port 0xf4 (--debug-exit: status 11).
        .text
        .globl  start
        .balign 4
        .long   0x1badb002, 0, -0x1badb002
start:  movb    $0x40, %al              # CMOS memory outlives the reset
        outb    %al, $0x70
        inb     $0x71, %al
        cmpb    $0x5a, %al
        je      2f
        movb    $0x5a, %al
        outb    %al, $0x71
        movb    $0xfe, %al
        outb    %al, $0x64
1:      hlt
        jmp     1b
2:      movb    $5, %al
        outb    %al, $0xf4
        jmp     1b
