r"""Answers as models write them: (kind, what stands in the box, gold, whether it is right).

A response is ``\boxed{...}`` around the second column, unless the kind begins with "text": then it
is the whole response.
"""

RIGHT, WRONG = True, False

ANSWERS: list[tuple[str, str, str, bool]] = [
    # numbers in other forms
    ("number", "1,024", "1024", RIGHT),
    ("number", "1{,}024", "1024", RIGHT),
    ("number", r"1\,024", "1024", RIGHT),
    ("number", "1 024", "1024", RIGHT),
    ("number", r"1\ 024\ 000", "1,024,000", RIGHT),
    ("number", "073", "73", RIGHT),
    ("number", "2^{10}", "1024", RIGHT),
    ("number", "2^10", "1024", RIGHT),
    ("number", "2**10", "1024", RIGHT),
    ("number", r"2^{5} \cdot 2^5", "1024", RIGHT),
    ("number", r"32 \times 32", "1024", RIGHT),
    ("number", "(2)(512)", "1024", RIGHT),
    ("number", "2⁵", "32", RIGHT),
    ("number", r"\sqrt{16}", "4", RIGHT),
    ("number", "√16", "4", RIGHT),
    ("number", r"\sqrt[3]{27}", "3", RIGHT),
    ("number", "4^{1/2}", "2", RIGHT),
    ("number", r"\sqrt{2} \cdot \sqrt{8}", "4", RIGHT),
    ("number", "5!", "120", RIGHT),
    ("number", r"\binom{5}{2}", "10", RIGHT),
    ("number", r"\log_2 8", "3", RIGHT),
    ("number", r"6.02 \times 10^{23}", "602000000000000000000000", RIGHT),
    ("number", "6.02e23", r"6.02 \times 10^{23}", RIGHT),
    ("number", "6.02 x 10^23", r"6.02\cdot 10^{23}", RIGHT),
    ("number", r"1.5 \times 10^{-3}", "0.0015", RIGHT),
    ("number", r"\frac{-1}{2}", r"-\frac{1}{2}", RIGHT),
    ("number", r"\frac{1}{-2}", "-0.5", RIGHT),
    ("number", r"-\dfrac12", "-1/2", RIGHT),
    ("number", "-½", "-0.5", RIGHT),
    ("number", "−3", "-3", RIGHT),
    ("number", "0.50", r"\frac{1}{2}", RIGHT),
    ("number", "3.25", r"\frac{13}{4}", RIGHT),
    ("number", r"3\frac{1}{4}", r"\frac{13}{4}", RIGHT),
    ("number", "3 1/4", "3.25", RIGHT),
    ("number", r"0.\overline{3}", r"\frac13", RIGHT),
    ("number", r"0.1\overline{6}", "1/6", RIGHT),
    ("number", r"\frac{6}{8}", "3/4", RIGHT),
    ("number", r"\frac{\sqrt{9}}{4}", "0.75", RIGHT),
    ("number", r"\mathbf{42}", "42", RIGHT),
    ("number", "**42**", "42", RIGHT),
    ("number", r"\boldsymbol{\frac{1}{2}}", "1/2", RIGHT),
    ("number", r"\textbf{42}", "42", RIGHT),
    ("number", r"\textcolor{red}{42}", "42", RIGHT),
    ("number", r"\(42\)", "42", RIGHT),
    ("number", "x = 42", "42", RIGHT),
    ("number", r"x = \frac{84}{2} = 42", "42", RIGHT),
    ("number", "m+n = 42", "42", RIGHT),
    ("number", r"\text{The answer is } 42", "42", RIGHT),
    ("number", "4 million", "4000000", RIGHT),
    ("number", "50%", "50", RIGHT),
    ("number", "50", r"50\%", RIGHT),
    ("number", r"50 \text{ percent}", r"50\%", RIGHT),
    ("number", r"\frac12", r"50\%", RIGHT),
    ("number", "0.5", "50%", RIGHT),
    ("number", "50%", "0.5", RIGHT),
    ("number", r"\pi", "3", WRONG),
    ("number", "2^{11}", "1024", WRONG),
    ("number", "0.3333", "1/3", WRONG),
    ("number", "0.333333333333", r"\frac{1}{3}", WRONG),
    ("number", "3.14", r"\pi", WRONG),
    ("number", "3.14159265358979", r"\pi", WRONG),
    ("number", "3.1416", "3.14", WRONG),
    ("number", "1.0000001", "1", WRONG),
    ("number", "1e-9", "2e-9", WRONG),
    ("number", "0.0000001", "0", WRONG),
    ("number", r"3 \times 10^{-8}", r"2 \times 10^{-8}", WRONG),
    ("number", r"6.6 \times 10^{-34}", r"6.626 \times 10^{-34}", WRONG),
    ("number", r"10^{-12}\pi", r"2\cdot10^{-12}\pi", WRONG),
    ("number", r"6.02 \times 10^{22}", r"6.02 \times 10^{23}", WRONG),
    ("number", "42.0001", "42", WRONG),
    ("number", "-42", "42", WRONG),
    ("number", r"\frac{1}{2}", r"-\frac{1}{2}", WRONG),
    ("number", "5 million", "5", WRONG),
    ("number", "5%", "50%", WRONG),
    ("number", "500%", "5000", WRONG),
    ("number", "42 or 43", "42", WRONG),
    ("number", "42, 43", "42", WRONG),
    ("number", "x + 42", "42", WRONG),
    ("number", "42x", "42", WRONG),
    ("number", r"42\pi", "42", WRONG),
    ("number", "42i", "42", WRONG),
    ("number", "42 squared", "42", WRONG),
    ("number", "9^{9^{9^9}}", "5", WRONG),
    ("number", "", "5", WRONG),
    # bases
    ("base", "101_2", "101_{2}", RIGHT),
    ("base", r"101_{\text{two}}", "101_2", RIGHT),
    ("base", "101 (base 2)", "101_2", RIGHT),
    ("base", "5_{10}", "5", RIGHT),
    ("base", "101_2", "101", WRONG),
    ("base", "101", "101_2", WRONG),
    ("base", "101_3", "101_2", WRONG),
    ("base", "110_2", "101_2", WRONG),
    ("base", "2517_8", "2516_8", WRONG),
    ("base", "A4_{16}", "A3_{16}", WRONG),
    # units and words behind a number
    ("unit", r"5\text{ cm}", "5", RIGHT),
    ("unit", "5 cm", "5", RIGHT),
    ("unit", "5cm", "5", RIGHT),
    ("unit", r"5\ \mathrm{cm}^2", r"5 \text{ square centimeters}", RIGHT),
    ("unit", r"9.8\,\mathrm{m/s^2}", "9.8", RIGHT),
    ("unit", "18 dollars", r"\$18", RIGHT),
    ("unit", r"\$18.00", "18", RIGHT),
    ("unit", "$18 per day", "18", RIGHT),
    ("unit", "72 clips altogether in April and May", "72", RIGHT),
    ("unit", "5", r"5 \text{ inches}", RIGHT),
    ("unit", r"90^\circ", "90", RIGHT),
    ("unit", "90 degrees", r"90^{\circ}", RIGHT),
    ("unit", "90°", "90", RIGHT),
    ("unit", r"\frac{3}{4} \text{ cup}", "0.75", RIGHT),
    ("unit", "about 5 apples", "5", RIGHT),
    ("unit", r"\approx 5.3", "5.3", RIGHT),
    ("unit", "5 (five)", "5", RIGHT),
    ("unit", "3 dozen", "36", RIGHT),
    ("unit", "3 dozen", "3", WRONG),
    ("unit", r"5 \text{ m}", r"5 \text{ cm}", WRONG),
    ("unit", "5 cm^3", "5 cm^2", WRONG),
    ("unit", "6 cm", "5 cm", WRONG),
    ("unit", "5 hundred", "5", WRONG),
    ("unit", "5 cents", "5 dollars", WRONG),
    ("unit", "5 to 6 days", "5", WRONG),
    ("unit", "5 or more", "5", WRONG),
    # words and choices
    ("word", r"\text{Monday}", "monday", RIGHT),
    ("word", "yes", "Yes", RIGHT),
    ("word", "Yes, it is", "yes", RIGHT),
    ("word", r"\textbf{even}", "even", RIGHT),
    ("word", "the circle", "circle", RIGHT),
    ("word", r"\text{no solution}", "No solution", RIGHT),
    ("word", "No", "Yes", WRONG),
    ("word", "odd", "even", WRONG),
    ("word", "Tuesday", "Monday", WRONG),
    ("word", "not even", "even", WRONG),
    ("choice", "(B)", "B", RIGHT),
    ("choice", r"\text{(B)}", "B", RIGHT),
    ("choice", "B) 42 apples", "B", RIGHT),
    ("choice", "B. Paris", "B", RIGHT),
    ("choice", "(B) $42$", "B", RIGHT),
    ("choice", r"\textbf{(B)}\ 42", "B", RIGHT),
    ("choice", "B", r"\text{(B)}", RIGHT),
    ("choice", "Option B", "B", RIGHT),
    ("choice", "B: Paris", "(B)", RIGHT),
    ("choice", "C) 42 apples", "B", WRONG),
    ("choice", "A or B", "B", WRONG),
    ("choice", "(A) and (B)", "B", WRONG),
    ("choice", "(B) and (C)", "B", WRONG),
    ("choice", "AB", "A", WRONG),
    ("choice", "A, B", "A", WRONG),
    ("choice", "Berlin", "B", WRONG),
    # matrices and vectors
    ("matrix", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", RIGHT),
    ("matrix", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", RIGHT),
    ("matrix", r"\begin{pmatrix} 2/2 \\ 2.0 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}",
     RIGHT),
    ("matrix", r"\left[\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right]",
     r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", RIGHT),
    ("matrix", r"\begin{pmatrix} 1 & 2 \\[2pt] 3 & 4 \end{pmatrix}",
     r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", RIGHT),
    ("matrix", "[[1, 2], [3, 4]]", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", RIGHT),
    ("matrix", "(1, 2)", r"\begin{pmatrix}1\\2\end{pmatrix}", RIGHT),
    ("matrix", r"\langle 1, 2, 3 \rangle", "(1,2,3)", RIGHT),
    ("matrix", r"\begin{pmatrix}1 & 2\end{pmatrix}^T", r"\begin{pmatrix}1\\2\end{pmatrix}", RIGHT),
    ("matrix", r"\begin{pmatrix} \sqrt{8} \\ 1 \end{pmatrix}",
     r"\begin{pmatrix}2\sqrt2\\1\end{pmatrix}", RIGHT),
    ("matrix", r"\frac{1}{5}\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
     r"\begin{pmatrix} 1/5 \\ 2/5 \end{pmatrix}", RIGHT),
    ("matrix", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", WRONG),
    ("matrix", r"\begin{pmatrix} 2 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", WRONG),
    ("matrix", r"\begin{pmatrix} 1 \\ 2 \\ 0 \end{pmatrix}",
     r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", WRONG),
    ("matrix", r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
     WRONG),
    ("matrix", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}",
     r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", WRONG),
    ("matrix", "1", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", WRONG),
    ("matrix", r"\frac{1}{5}\begin{pmatrix} 1 \\ 3 \end{pmatrix}",
     r"\begin{pmatrix} 1/5 \\ 2/5 \end{pmatrix}", WRONG),
    ("matrix", r"\begin{pmatrix} -1 \\ 4 \end{pmatrix} + t\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
     r"\begin{pmatrix} -1+t \\ 4+2t \end{pmatrix}", RIGHT),
    ("matrix", r"\begin{pmatrix} -1 \\ 4 \end{pmatrix} + t\begin{pmatrix} 1 \\ 3 \end{pmatrix}",
     r"\begin{pmatrix} -1+t \\ 4+2t \end{pmatrix}", WRONG),
    ("matrix", r"\begin{bmatrix} 1/2 & -3 \\ 0 & \sqrt{4} \end{bmatrix}",
     r"\begin{pmatrix} 0.5 & -3 \\ 0 & 2 \end{pmatrix}", RIGHT),
    ("matrix", r"\begin{bmatrix} 1/2 & 3 \\ 0 & \sqrt{4} \end{bmatrix}",
     r"\begin{pmatrix} 0.5 & -3 \\ 0 & 2 \end{pmatrix}", WRONG),
    # tuples, lists, sets
    ("tuple", r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", RIGHT),
    ("tuple", "(3, \\pi/2)", r"\left(3,\frac{\pi}{2}\right)", RIGHT),
    ("tuple", "(1/2, 3)", r"\left(\frac12, 3\right)", RIGHT),
    ("tuple", "x=1, y=2", "(1,2)", RIGHT),
    ("tuple", "y=2, x=1", "(1,2)", RIGHT),
    ("tuple", "x=1, y=2, z=3", "x=1,y=2,z=3", RIGHT),
    ("tuple", "(x, y) = (1, 2)", "(1,2)", RIGHT),
    ("tuple", "x=9, y=9, z=3", "x=1, y=2, z=3", WRONG),
    ("tuple", "x=1, y=9, z=3", "x=1, y=2, z=3", WRONG),
    ("tuple", "(2,1)", "(1,2)", WRONG),
    ("tuple", "(1,2,3)", "(1,2)", WRONG),
    ("tuple", r"(3, \frac{\pi}{3})", r"(3,\frac{\pi}{2})", WRONG),
    ("tuple", "(1, 5, 3)", "(1, 2, 3)", WRONG),
    ("list", "2, 1", "1, 2", RIGHT),
    ("list", "1 and 2", "1,2", RIGHT),
    ("list", r"1 \text{ or } 2", "1,2", RIGHT),
    ("list", r"x = 1 \text{ or } x = 2", "1,2", RIGHT),
    ("list", "x = 1, 2", "1,2", RIGHT),
    ("list", r"\{1, 2\}", "1,2", RIGHT),
    ("list", r"2 \pm \sqrt{3}", r"2+\sqrt{3}, 2-\sqrt{3}", RIGHT),
    ("list", r"\pm 2", "-2, 2", RIGHT),
    ("list", "(3,4), (1,2)", "(1,2),(3,4)", RIGHT),
    ("list", "1, 2, 3, and 5", "1,2,3,5", RIGHT),
    ("list", "1,2,4,5", "1,2,3,5", WRONG),
    ("list", "1", "1,2", WRONG),
    ("list", "1,2,2", "1,1,2", WRONG),
    ("list", r"2 \pm \sqrt{5}", r"2+\sqrt{3}, 2-\sqrt{3}", WRONG),
    ("list", "2", r"\pm 2", WRONG),
    ("list", "(1,2), (3,5)", "(1,2),(3,4)", WRONG),
    ("set", r"\{2, 1\}", r"\{1,2\}", RIGHT),
    ("set", r"\left\{\frac12, 1\right\}", r"\{0.5,1\}", RIGHT),
    ("set", r"\{1, 3\}", r"\{1,2\}", WRONG),
    ("set", "(1, 2)", r"\{1,2\}", WRONG),
    # intervals
    ("interval", "[1, 2)", "[1,2)", RIGHT),
    ("interval", r"(-\infty, 2]", r"(-\infty,2]", RIGHT),
    ("interval", r"x \in [1, 2)", "[1,2)", RIGHT),
    ("interval", r"1 \le x < 2", "[1,2)", RIGHT),
    ("interval", r"x \geq 3", r"[3,\infty)", RIGHT),
    ("interval", r"(-\infty, -1) \cup (1, \infty)", r"(1,\infty) \cup (-\infty,-1)", RIGHT),
    ("interval", r"x < -1 \text{ or } x > 1", r"(-\infty,-1) \cup (1,\infty)", RIGHT),
    ("interval", r"2 > x \ge 1", "[1,2)", RIGHT),
    ("interval", "[1, 2]", "[1,2)", WRONG),
    ("interval", "(1, 2)", "[1,2]", WRONG),
    ("interval", "[1, 3)", "[1,2)", WRONG),
    ("interval", "[0, 2)", "[1,2)", WRONG),
    ("interval", r"(-\infty, -1) \cup (2, \infty)", r"(-\infty,-1) \cup (1,\infty)", WRONG),
    ("interval", r"x > 3", r"x \ge 3", WRONG),
    # expressions
    ("expression", "1+x", "x+1", RIGHT),
    ("expression", r"\sqrt{8}", r"2\sqrt{2}", RIGHT),
    ("expression", r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", RIGHT),
    ("expression", r"(x-1)(x+1)", "x^2-1", RIGHT),
    ("expression", r"\pi/2", r"\frac{\pi}{2}", RIGHT),
    ("expression", "0.5x", r"\frac{x}{2}", RIGHT),
    ("expression", r"y = 2x + 1", "2x+1", RIGHT),
    ("expression", r"2x+1", "y = 2x+1", RIGHT),
    ("expression", r"y - 2x = 1", "y = 2x+1", RIGHT),
    ("expression", "4i+3", "3+4i", RIGHT),
    ("expression", r"\log_{2} x", r"\frac{\ln x}{\ln 2}", RIGHT),
    ("expression", r"f(x) = x^2", "x^2", RIGHT),
    ("expression", r"e^{2}", "e^2", RIGHT),
    ("expression", r"12\pi \text{ cm}^2", r"12\pi", RIGHT),
    ("expression", "x-1", "x+1", WRONG),
    ("expression", "y = 2x + 2", "y = 2x+1", WRONG),
    ("expression", "x^3", "x^2", WRONG),
    ("expression", r"12\pi", r"13\pi", WRONG),
    ("expression", r"\frac{\sqrt{3}}{2}", r"\frac{1}{\sqrt{3}}", WRONG),
    ("expression", r"10^{-10}x", r"2 \cdot 10^{-10}x", WRONG),
    ("expression", "3-4i", "3+4i", WRONG),
    ("expression", "f'(x)", "f(x)", WRONG),
    ("expression", "(((", "x+1", WRONG),
    ("expression", "\x00", "x+1", WRONG),
    # whole responses
    ("text", r"so \boxed 42", "42", RIGHT),
    ("text", r"so $\boxed\frac{1}{2}$.", "1/2", RIGHT),
    ("text", r"so $\boxed{1}$ and $\boxed{2}$", "1,2", RIGHT),
    ("text", r"\boxed{41} no, \boxed{42}", "42", RIGHT),
    ("text", "The answer is 42, because 40 + 2 = 42.", "42", RIGHT),
    ("text", "The answer is \\[\n42\n\\]", "42", RIGHT),
    ("text", "**Final Answer:** 42", "42", RIGHT),
    ("text", "<think>It is \\boxed{41}</think>The answer is 42.", "42", RIGHT),
    ("text", "It is \\boxed{41}</think>The answer is 42.", "42", RIGHT),
    ("text", "<answer>42</answer>", "42", RIGHT),
    ("text", "<think>41</think> <answer> \\boxed{42} </answer>", "42", RIGHT),
    ("text", "<think>\\boxed{42}", "42", WRONG),
    ("text", "<think>\\boxed{42}</think> I am not sure.", "42", WRONG),
    ("text", "\\boxed{42}\n<think>or is it", "42", WRONG),
    ("text", r"\boxed{42} but \boxed{4", "42", WRONG),
    ("text", r"\boxed{42", "42", WRONG),
    ("text", "so we get 42", "42", WRONG),
    ("text", "<answer>42", "42", WRONG),
]  # fmt: skip

# Further forms, one a line: answer ||| gold ||| 1 where it is right.
_FORMS = r"""
\frac{3}{2} ||| 1\frac{1}{2} ||| 1
11\sqrt2 ||| 11\sqrt{2} ||| 1
\dfrac{14}{3} ||| \frac{14}{3} ||| 1
p - q ||| p-q ||| 1
\text{Evelyn} ||| Evelyn ||| 1
\text{Evelyn's} ||| Evelyn ||| 0
5r^5 ||| 5r^{5} ||| 1
\frac{1}{1-x} ||| -\frac{1}{x-1} ||| 1
6 - 5i ||| 6-5i ||| 1
(6,31,-1) ||| (6, 31, -1) ||| 1
\left( \frac{3}{2}, -13 \right) ||| (1.5,-13) ||| 1
[-2,7] ||| -2 \le x \le 7 ||| 1
\sqrt{51} ||| \sqrt{51} ||| 1
x \in [-2, 7] ||| [-2,7] ||| 1
3 \pm 2 \sqrt{2} ||| 3+2\sqrt2, 3-2\sqrt2 ||| 1
3+2\sqrt2, 3-2\sqrt2 ||| 3 \pm 2 \sqrt{2} ||| 1
1 \pm \sqrt{19} ||| 1 \pm \sqrt{19} ||| 1
$\frac{243}{625}$ ||| \frac{243}{625} ||| 1
-\frac{35}{9} ||| \frac{-35}{9} ||| 1
y=2x+3 ||| 2x-y+3=0 ||| 1
x^2+y^2=4 ||| y^2 + x^2 - 4 = 0 ||| 1
x^2+y^2=5 ||| y^2 + x^2 - 4 = 0 ||| 0
10:00 \text{ a.m.} ||| 10:00 a.m. ||| 1
10:00 AM ||| 10:00 \text{ a.m.} ||| 1
10:00 PM ||| 10:00 \text{ a.m.} ||| 0
3:4 ||| 3 : 4 ||| 1
3:4 ||| 3:5 ||| 0
\text{June 20} ||| June 20 ||| 1
\text{June 21} ||| June 20 ||| 0
\emptyset ||| \varnothing ||| 1
\text{No real solutions} ||| \text{no real solutions} ||| 1
\infty ||| +\infty ||| 1
-\infty ||| \infty ||| 0
\frac{\pi}{4} + 2\pi k ||| \frac{\pi}{4}+2k\pi ||| 1
2\pi \text{ radians} ||| 2\pi ||| 1
45^\circ ||| \frac{\pi}{4} ||| 0
\angle A = 45^\circ ||| 45 ||| 1
AB = 5 ||| 5 ||| 1
\overline{AB} = 5 ||| 5 ||| 1
|x| ||| |x| ||| 1
\left|x-1\right| ||| |1-x| ||| 1
\begin{cases} x = 1 \\ y = 2 \end{cases} ||| (1,2) ||| 1
\begin{aligned} x &= 1 \\ y &= 2 \end{aligned} ||| x=1,y=2 ||| 1
(x,y)=(1,2) \text{ and } (3,4) ||| (1,2),(3,4) ||| 1
x=1,y=2 \text{ or } x=3,y=4 ||| (1,2),(3,4) ||| 1
\{(1,2),(3,4)\} ||| (1,2),(3,4) ||| 1
5, 7, 11 ||| 5,7,11 ||| 1
5;7;11 ||| 5,7,11 ||| 1
1,2,\ldots,10 ||| 1,2,\ldots,11 ||| 0
1,2,\ldots,10 ||| 1,2,\dots,10 ||| 1
\mathbf{i}+2\mathbf{j} ||| i+2j ||| 1
\begin{pmatrix}1&0\\0&1\end{pmatrix} ||| \begin{bmatrix}1&0\\0&1\end{bmatrix} ||| 1
4x^2+4x+1 ||| (2x+1)^2 ||| 1
2(x+1)^2 ||| (2x+1)^2 ||| 0
\frac{x+1}{x-1} ||| \frac{x-1}{x+1} ||| 0
e^{i\pi/3} ||| \frac12 + \frac{\sqrt3}{2}i ||| 1
\cos 60^\circ ||| \frac12 ||| 1
\sin(\frac{\pi}{6}) ||| 0.5 ||| 1
sqrt(2)/2 ||| \frac{1}{\sqrt{2}} ||| 1
sqrt(16) ||| 4 ||| 1
(1/2) ||| 0.5 ||| 1
\ln(2) ||| \ln 2 ||| 1
\log 100 ||| 2 ||| 1
2\ln 2 ||| \ln 4 ||| 1
3^{12}\cdot 61 ||| 3^{12} \cdot 61 ||| 1
2^3 \cdot 3^2 ||| 72 ||| 1
2^{2010} ||| 2^{2010} ||| 1
2^{2010} ||| 2^{2011} ||| 0
2^{2010}-1 ||| 2^{2010} ||| 0
\lfloor 3.7 \rfloor ||| 3 ||| 1
\frac{a+b}{2} ||| \frac{1}{2}(a+b) ||| 1
5 - \sqrt{x} ||| 5-x^{1/2} ||| 1
x^{-1} ||| \frac{1}{x} ||| 1
a_n = 2n+1 ||| 2n+1 ||| 1
f(x)=2x ||| g(x) = 2x ||| 0
n(n+1)/2 ||| \frac{n(n+1)}{2} ||| 1
C(5,2) ||| 10 ||| 0
-1 < x < 1 ||| |x| < 1 ||| 0
\$1,234.50 ||| 1234.5 ||| 1
€5 ||| 5 ||| 1
5 USD ||| 5 ||| 1
25\% ||| \frac{1}{4} ||| 1
25\% ||| 25 ||| 1
0.25 ||| 25 ||| 0
12 \text{ inches} ||| 12 ||| 1
12'' ||| 12 ||| 1
6'2" ||| 6 ||| 0
1/3 cup ||| 1/3 ||| 1
3x ||| 3 ||| 0
\frac{5}{x} ||| 5 ||| 0
5 \pmod{7} ||| 5 ||| 0
x \equiv 5 \pmod 7 ||| x \equiv 5 \pmod{7} ||| 1
x \equiv 4 \pmod 7 ||| x \equiv 5 \pmod{7} ||| 0
\text{A,B,E} ||| A,B,E ||| 1
\text{A and B} ||| A,B ||| 1
\text{A,C,E} ||| A,B,E ||| 0
(C) ||| \text{(C)} ||| 1
C ||| \textbf{(C)} ||| 1
\text{C. } 42 ||| C ||| 1
\text{True} ||| True ||| 1
\text{east} ||| \text{west} ||| 0
z = 1 ||| w = 1 ||| 0
\text{the set of all primes} ||| \text{the set of all primes} ||| 1
1.0 ||| 1 ||| 1
.5 ||| 0.5 ||| 1
5. ||| 5 ||| 1
1e3 ||| 1000 ||| 1
1E3 ||| 1000 ||| 1
10^3 ||| 1000 ||| 1
10^{3} \text{ m} ||| 1000 ||| 1
1.2.3 ||| 1.2 ||| 0
1,2 ||| 12 ||| 0
1,23 ||| 123 ||| 0
1;2 ||| (1,2) ||| 1
1\times 10^{-20} ||| 2 \times 10^{-20} ||| 0
\begin{pmatrix}10^{-20}\\1\end{pmatrix} ||| \begin{pmatrix}0\\1\end{pmatrix} ||| 0
(10^{-9}\pi, 1) ||| (0,1) ||| 0
\sqrt{2}+10^{-10} ||| \sqrt{2} ||| 0
1.4142135623731 ||| \sqrt{2} ||| 0
\frac{22}{7} ||| \pi ||| 0
(-\infty, \infty) ||| \mathbb{R} ||| 1
\mathbb{R} \setminus \{0\} ||| (-\infty,0)\cup(0,\infty) ||| 1
x \neq 0 ||| (-\infty,0)\cup(0,\infty) ||| 1
(0,1)\cup(1,2) ||| (0,2) ||| 0
[0,1] \cup [1,2] ||| [0,2] ||| 0
]0,1[ ||| (0,1) ||| 1
0<x\leq 1 ||| (0,1] ||| 1
\frac{1}{2}x^2 + C ||| \frac{x^2}{2}+C ||| 1
x^2/2 + C ||| \frac{x^2}{2} ||| 0
3.0 \times 10^8 m/s ||| 3\times10^8 ||| 1
(3, 4]. ||| (3,4] ||| 1
\boxed{7} ||| 7 ||| 1
\underline{7} ||| 7 ||| 1
7 \; ||| 7 ||| 1
7 ~ ||| 7 ||| 1
"7" ||| 7 ||| 1
`7` ||| 7 ||| 1
_7_ ||| 7 ||| 1
*7* ||| 7 ||| 1
7 \checkmark ||| 7 ||| 1
7! ||| 5040 ||| 1
\text{7} ||| 7 ||| 1
\textit{seven} ||| 7 ||| 0
\frac{7}{1} ||| 7 ||| 1
\dfrac{9}{7} ||| 1 \frac{2}{7} ||| 1
\frac{9}{7} \text{ or } 1\frac{2}{7} ||| 9/7 ||| 0
8\frac{1}{3}\% ||| 8\frac13 ||| 1
33\frac{1}{3}\% ||| \frac{1}{3} ||| 1
-3, -2, -1 ||| -1, -2, -3 ||| 1
-3, -2, 1 ||| -1, -2, -3 ||| 0
3,-2 ||| (3,-2) ||| 1
2 + 3\sqrt{2}i ||| 2+3i\sqrt{2} ||| 1
36 + 9\pi ||| 9(4+\pi) ||| 1
9\pi+36 \text{ square units} ||| 9(4+\pi) ||| 1
\text{(A) } 5 \text{ and (B) } 6 ||| A ||| 0
\text{Yes.} ||| yes ||| 1
x=-1 \text{ and } x=3 ||| -1,3 ||| 1
t = 3 \text{ s} ||| 3 ||| 1
v = 3 m/s ||| 3 ||| 1
\frac{3}{4}\text{ of the cake} ||| 3/4 ||| 1
three ||| 3 ||| 0
1^{\text{st}} ||| 1 ||| 1
21^{st} ||| 21 ||| 1
21st ||| 21 ||| 1
1 : 2 ||| \frac12 ||| 0
f^{-1}(x)=\frac{x}{2} ||| \frac{x}{2} ||| 1
\left(x+2\right)\left(x-2\right) ||| x^{2}-4 ||| 1
\left\{ -1, 0, 1 \right\} ||| \{0,1,-1\} ||| 1
\left \lfloor 2.5 \right \rfloor ||| 2 ||| 1
\frac{\frac{1}{2}}{3} ||| 1/6 ||| 1
\tfrac{1}{2} ||| 0.5 ||| 1
\nicefrac{1}{2} ||| 0.5 ||| 1
\sqrt{x^2} ||| x ||| 0
\sqrt[3]{2} ||| 2^{1/3} ||| 1
a=1,b=2,c=3 ||| 1,2,3 ||| 1
a=1,b=2,c=3 ||| (1,2,3) ||| 1
a=1,b=3,c=2 ||| (1,2,3) ||| 0
\left(\begin{array}{c}1\\2\end{array}\right) ||| \begin{pmatrix}1\\2\end{pmatrix} ||| 1
\begin{pmatrix}1\\-2\end{pmatrix} ||| \begin{pmatrix}1\\2\end{pmatrix} ||| 0
\begin{pmatrix}1&2\\3&4\end{pmatrix} ||| \begin{pmatrix}1&2\\3&5\end{pmatrix} ||| 0
\begin{pmatrix}1 \\\frac{1}{2}\end{pmatrix} ||| \begin{pmatrix}1\\0.5\end{pmatrix} ||| 1
\\begin{pmatrix}1\\\\2\\end{pmatrix} ||| \begin{pmatrix}1\\2\end{pmatrix} ||| 1
\\frac{1}{2} ||| 0.5 ||| 1
\frac12, \frac13 ||| 1/3, 1/2 ||| 1
12,000 and 13,000 ||| 13000, 12000 ||| 1
1,000, 2,000 ||| 1000, 2000 ||| 1
1,000,2,000 ||| 1000, 2000 ||| 0
n = 12 \text{ or } n = 15 ||| 12, 15 ||| 1
n \in \{12, 15\} ||| 12, 15 ||| 1
\$32,\!348 ||| 32348 ||| 1
10,\! 080 ||| 10080 ||| 1
y = \frac{1}{2} x + 3 ||| y = 0.5x+3 ||| 1
y = \frac{1}{2} x + 3 ||| y = 0.5x+4 ||| 0
\text{(-1, 0)} ||| (-1,0) ||| 1
\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right] ||| [\pi^2/8, 1.25\pi^2] ||| 1
x^2+2x+1=0 ||| (x+1)^2=0 ||| 1
12 + 3i ||| 12+3i ||| 1
\frac{2 + i}{5} ||| 0.4 + 0.2i ||| 1
4 \sqrt{3} \text{ cm} ||| 4\sqrt{3} ||| 1
4 \sqrt{3} ||| 4\sqrt{3} \text{ cm}^2 ||| 1
\frac{\pi}{2}, \frac{3\pi}{2} ||| \frac{3 \pi}{2}, \frac{\pi}{2} ||| 1
\{ \frac{\pi}{2}, \frac{3\pi}{2} \} ||| \frac{3 \pi}{2}, \frac{\pi}{4} ||| 0
0.1 + 0.2 ||| 0.3 ||| 1
100! ||| 100! ||| 1
10^{100} ||| 1e100 ||| 1
10^{100}+1 ||| 10^{100} ||| 0
(a,b,c) = (1,2,3) ||| (1,2,3) ||| 1
a+b+c=6 ||| 6 ||| 1
\text{Answer: } 6 ||| 6 ||| 1
6. ||| 6 ||| 1
6; ||| 6 ||| 1
(6) ||| 6 ||| 1
[6] ||| 6 ||| 1
{6} ||| 6 ||| 1
6\text{.} ||| 6 ||| 1
6 \text{ (six)} ||| 6 ||| 1
-6 ||| (-6) ||| 1
+6 ||| 6 ||| 1
6 \cdot 10^0 ||| 6 ||| 1
\frac{12}{2} = 6 ||| 6 ||| 1
6 = \frac{12}{2} ||| 6 ||| 1
x \approx 6 ||| 6 ||| 1
6 \approx 6.0001 ||| 6 ||| 1
0.06 \times 10^{2} ||| 6 ||| 1
6.00 ||| 6 ||| 1
6,0 ||| 6 ||| 0
600% ||| 6 ||| 0
six ||| 6 ||| 0
VI ||| 6 ||| 0
6x^0 ||| 6 ||| 0
(-1)^{n+2} ||| (-1)^n ||| 1
2^{n+1} ||| 2 \cdot 2^n ||| 1
n! ||| n(n-1)! ||| 1
\tan^2 x + 1 ||| \sec^2 x ||| 1
\sin^2 x ||| 1-\cos^2 x ||| 1
\sin 2x ||| 2 \sin x \cos x ||| 1
\log_{10} 5 ||| \frac{\ln 5}{\ln 10} ||| 1
\frac{x^2-1}{x-1} ||| x+1 ||| 1
A = \{1,2,3\} ||| \{1,2,3\} ||| 1
\{1,2,3,\ldots\} ||| \{1,2,3,\ldots\} ||| 1
\{1,2,3,\ldots\} ||| \{1,2,4,\ldots\} ||| 0
(1,2] \cup \{3\} ||| (1,2]\cup\{3\} ||| 1
(1,2] \cup \{4\} ||| (1,2]\cup\{3\} ||| 0
1 \leq x \leq 2 ||| [1,2] ||| 1
x\in(-\infty,1]\cup[2,\infty) ||| (-\infty,1]\cup[2,\infty) ||| 1
x \le 1 \text{ or } x \ge 2 ||| (-\infty,1]\cup[2,\infty) ||| 1
x \le 1 \text{ and } x \ge -2 ||| [-2,1] ||| 1
x \le 1 \lor x \ge 2 ||| (-\infty,1]\cup[2,\infty) ||| 1
-2 \le x \text{ and } x \le 1 ||| [-2,1] ||| 1
\boxed{\text{(C)}} ||| C ||| 1
\text{C: } \frac12 ||| C ||| 1
\mathrm{C} ||| C ||| 1
c ||| C ||| 0
C, because it is ||| C ||| 1
C - 42 ||| C ||| 1
C \text{ (42)} ||| C ||| 1
D) 42 ||| C ||| 0
(C)\ 42\text{ apples and pears} ||| C ||| 1
A, C ||| A,C ||| 1
A, D ||| A,C ||| 0
1.60 \times 10^{-19} ||| 1.6\times 10^{-19} ||| 1
1.61 \times 10^{-19} ||| 1.6\times 10^{-19} ||| 0
1.6 \times 10^{-19} \, \text{C} ||| 1.6\times 10^{-19} ||| 1
5\;\Omega ||| 5 ||| 1
5 \times 10^{14} \text{ Hz} ||| 5\times10^{14} ||| 1
5 \mu m ||| 5 ||| 1
37^\circ \text{C} ||| 37 ||| 1
37^\circ \text{C} ||| 37^\circ \text{F} ||| 0
7 \text{ N·m} ||| 7 ||| 1
7 \text{ kg} \cdot \text{m}^2 ||| 7 ||| 1
7 \text{ mol L}^{-1} ||| 7 ||| 1
7 \frac{\text{m}}{\text{s}} ||| 7 ||| 1
7 : 3 ||| 7:3 ||| 1
3 to 7 ||| 3:7 ||| 1
07:30 ||| 7:30 ||| 0
2x + 3y = 5 ||| 4x+6y=10 ||| 1
2x + 3y = 5 ||| 4x+6y=11 ||| 0
y > 2x ||| 2x < y ||| 1
y > 2x ||| y \ge 2x ||| 0
x = 3, y = -1 ||| x=3,y=1 ||| 0
(3, 3\sqrt{3}) ||| (3,3\sqrt3) ||| 1
\left( 3, \frac{3\pi}{2} \right) ||| (3, 270^\circ) ||| 0
f(x) = 3x ||| 3x ||| 1
P(x) = x^2 - 1 ||| (x-1)(x+1) ||| 1
\dfrac{\sqrt[3]{4}}{2} ||| 2^{-1/3} ||| 1
\sqrt{3 + 2\sqrt2} ||| 1+\sqrt2 ||| 1
\sqrt{3 + 2\sqrt2} ||| 1+\sqrt3 ||| 0
\frac{1+\sqrt5}{2} ||| \phi ||| 0
1,2,3 ||| 3,2,1 ||| 1
(1,2,3) ||| 1,2,3 ||| 1
123 ||| 1,2,3 ||| 0
\text{none} ||| \text{None} ||| 1
\text{neither} ||| \text{None} ||| 0
0 ||| \text{None} ||| 0
\frac{0}{5} ||| 0 ||| 1
-0 ||| 0 ||| 1
10\% ||| 0.1 ||| 1
\frac{1}{10} ||| 10\% ||| 1
\text{10 percent} ||| 10\% ||| 1
10 ||| 10\% ||| 1
9\% ||| 10\% ||| 0
-\frac{\sqrt{3}}{2} ||| \frac{-\sqrt{3}}{2} ||| 1
\frac{3 \pm \sqrt{5}}{2} ||| \frac{3+\sqrt5}{2}, \frac{3-\sqrt5}{2} ||| 1
\frac{3 \pm \sqrt{7}}{2} ||| \frac{3+\sqrt5}{2}, \frac{3-\sqrt5}{2} ||| 0
k = \pm 2 ||| 2, -2 ||| 1
x = 2, x = -2 ||| \pm 2 ||| 1
2, -2 ||| \pm 3 ||| 0
5\sqrt{5} \text{ units} ||| 5\sqrt5 ||| 1
\text{about } 3.5 \text{ hours} ||| 3.5 ||| 1
3.5\text{ h} ||| 3.5 ||| 1
\$0.75 ||| 0.75 ||| 1
75 cents ||| 75 ||| 1
75¢ ||| 75 ||| 1
¥500 ||| 500 ||| 1
£3.50 ||| 3.5 ||| 1
1,000,000 ||| 10^6 ||| 1
10^{6} ||| 1{,}000{,}000 ||| 1
1 million dollars ||| 1000000 ||| 1
2.5 \times 10^{5} ||| 250000 ||| 1
2.5 \cdot 10^{-5} ||| 0.000025 ||| 1
2.5 \cdot 10^{-5} ||| 0.00025 ||| 0
2.5E+5 ||| 250000 ||| 1
1/0.5 ||| 2 ||| 1
\frac{0.5}{2} ||| 0.25 ||| 1
(-3)^2 ||| 9 ||| 1
-3^2 ||| 9 ||| 0
\left(\frac{2}{3}\right)^{3} ||| \frac{8}{27} ||| 1
\left(\frac{2}{3}\right)^{4} ||| \frac{8}{27} ||| 0
\frac{2^3}{3^3} ||| \frac{8}{27} ||| 1
6^{-1} ||| \frac16 ||| 1
\sqrt{\frac{1}{4}} ||| 0.5 ||| 1
\sqrt[4]{16} ||| 2 ||| 1
8^{\frac{2}{3}} ||| 4 ||| 1
\sqrt{2}\sqrt{3} ||| \sqrt{6} ||| 1
\frac{\sqrt{2}}{\sqrt{3}} ||| \frac{\sqrt{6}}{3} ||| 1
\sqrt{12}+\sqrt{27} ||| 5\sqrt{3} ||| 1
\sqrt{12}+\sqrt{27} ||| 6\sqrt{3} ||| 0
\cos\frac{\pi}{3} ||| \frac12 ||| 1
\log_{2}(8) ||| 3 ||| 1
\ln e^3 ||| 3 ||| 1
3! + 1 ||| 7 ||| 1
{5 \choose 2} ||| 10 ||| 1
_5C_2 ||| 10 ||| 0
\begin{bmatrix} 7 \\ -3 \\ 0 \end{bmatrix} ||| \begin{pmatrix} 7 \\ -3 \\ 0 \end{pmatrix} ||| 1
\begin{bmatrix} 7 \\ 3 \\ 0 \end{bmatrix} ||| \begin{pmatrix} 7 \\ -3 \\ 0 \end{pmatrix} ||| 0
[7, -3, 0] ||| \begin{pmatrix} 7 \\ -3 \\ 0 \end{pmatrix} ||| 1
(7, -3, 0)^T ||| \begin{pmatrix} 7 \\ -3 \\ 0 \end{pmatrix} ||| 1
\begin{smallmatrix} 1 & 2 \end{smallmatrix} ||| (1,2) ||| 1
\{(x, y) : x > 0\} ||| \{(x,y) : x > 0\} ||| 1
\{x : x > 2\} ||| (2,\infty) ||| 1
\{x \in \mathbb{R} \mid x > 2\} ||| (2,\infty) ||| 1
\{x \mid x \ge 2\} ||| (2,\infty) ||| 0
x > 2 ||| (2,\infty) ||| 1
2 < x ||| (2,\infty) ||| 1
x \not= 2 ||| (-\infty,2) \cup (2,\infty) ||| 1
(-\infty,2) \cup (2,\infty) ||| x \ne 2 ||| 1
(-\infty,2] \cup (2,\infty) ||| x \ne 2 ||| 0
[-1, 1] ||| -1 \leqslant x \leqslant 1 ||| 1
[-1, 1) ||| -1 \leqslant x \leqslant 1 ||| 0
|x| \le 1 ||| [-1,1] ||| 0
(1, 2), (2, 1) ||| (2,1),(1,2) ||| 1
(1, 2) \text{ and } (2, 1) ||| (2,1),(1,2) ||| 1
\{(1,2), (2,1)\} ||| \{(2,1),(1,3)\} ||| 0
\text{(A), (C)} ||| A, C ||| 1
\text{B and C} ||| B, C ||| 1
\text{I and III} ||| \text{I, III} ||| 1
\text{I and II} ||| \text{I, III} ||| 0
\text{Answer: B} ||| B ||| 1
\text{The answer is B} ||| B ||| 1
\text{B is correct} ||| B ||| 1
\textbf{B} ||| B ||| 1
\mathbf{(B)}\ \frac{1}{2} ||| B ||| 1
(B)\;\frac{1}{2} ||| C ||| 0
D. None of the above ||| D ||| 1
\text{12:30 PM} ||| 12:30 p.m. ||| 1
12{:}30 \text{ PM} ||| 12:30 PM ||| 1
\text{June 5, 2020} ||| June 5, 2020 ||| 1
\text{red, blue} ||| blue, red ||| 1
\text{true} ||| True ||| 1
\text{False} ||| True ||| 0
\text{undefined} ||| undefined ||| 1
\text{DNE} ||| DNE ||| 1
\text{infinitely many} ||| infinitely many ||| 1
\infty ||| \text{infinity} ||| 1
\pi^2/6 ||| \frac{\pi^2}{6} ||| 1
1.644934 ||| \frac{\pi^2}{6} ||| 0
e ||| 2.718281828 ||| 0
4x^3 - 3x ||| x(4x^2-3) ||| 1
4x^3 - 3x ||| x(4x^2-4) ||| 0
\frac{x}{x+1} ||| 1 - \frac{1}{x+1} ||| 1
2^{x+1} ||| 2\cdot2^x ||| 1
a^2+2ab+b^2 ||| (a+b)^2 ||| 1
(y+3)(x-2) ||| (x-2)(y+3) ||| 1
x=3y+2 ||| 3y+2 ||| 1
y = -\frac{2}{3}x + 5 ||| 2x+3y=15 ||| 1
\frac{x^2}{4}+\frac{y^2}{9}=1 ||| 9x^2+4y^2=36 ||| 1
\frac{x^2}{4}+\frac{y^2}{9}=1 ||| 9x^2+4y^2=35 ||| 0
2\sqrt{3}\,\text{cm}^2 ||| 2\sqrt3 ||| 1
144\pi\text{ cubic inches} ||| 144\pi ||| 1
144\pi ||| 144 ||| 0
\frac{1}{3}\pi r^2 h ||| \frac{\pi r^2 h}{3} ||| 1
v_0 t + \frac{1}{2} a t^2 ||| \frac{at^2}{2} + v_0 t ||| 1
F = ma ||| ma ||| 1
3\text{:}1 ||| 3:1 ||| 1
3 \text{ to } 1 ||| 3:1 ||| 1
0.\overline{142857} ||| \frac17 ||| 1
0.142857 ||| \frac17 ||| 0
14.2\overline{3} ||| \frac{427}{30} ||| 1
1\,234\,567 ||| 1234567 ||| 1
٥ ||| 5 ||| 0
５ ||| 5 ||| 1
12.0\% ||| 12\% ||| 1
0.12 ||| 12\% ||| 1
1.2\% ||| 12\% ||| 0
110_2 ||| 6 ||| 0
1101_{\text{base } 2} ||| 1101_2 ||| 1
1\text{A}_{16} ||| 1A_{16} ||| 1
5 \mod 7 ||| 5 ||| 0
11 \text{ R } 2 ||| 11 ||| 0
2^{3} \cdot 3 \cdot 5 ||| 120 ||| 1
2^3 \times 3 \times 7 ||| 120 ||| 0
"""
for _line in _FORMS.strip().splitlines():
    _answer, _gold, _mark = _line.split(" ||| ")
    ANSWERS.append(("form", _answer, _gold, _mark == "1"))
