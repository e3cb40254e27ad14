"""The page's style sheet: one column, the system's own type, light and dark, from a phone to a wide screen.

Colours are chosen to be told apart with colour-blind eyes (Okabe and Ito's order, darkened or lightened for contrast),
and right and wrong neighbours differ by a sign as well as by colour.
"""

STYLE = """
:root{color-scheme:light dark;--ground:#fcfcfa;--card:#fff;--ink:#1d2126;--soft:#5b646e;--rule:#e2e3df;
--c1:#0066a8;--c2:#c25700;--c3:#00805c;--c4:#a04a80;--c5:#7a6a00;--c0:#4a545e;--good:#00805c;--bad:#b93c1c}
@media (prefers-color-scheme:dark){:root{--ground:#14171a;--card:#1b1f23;--ink:#e6e8ea;--soft:#9aa4ae;--rule:#30363c;
--c1:#63b3ea;--c2:#f0a04b;--c3:#3fc79d;--c4:#dc94c0;--c5:#d9c84f;--c0:#aab4be;--good:#3fc79d;--bad:#f08466}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:70rem;margin:0 auto;padding:2.5rem clamp(1rem,4vw,2.5rem) 5rem}
h1{font-size:clamp(1.6rem,4vw,2.3rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.3rem;letter-spacing:-.01em;margin:3.2rem 0 .4rem;padding-top:1rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.6rem 0 .4rem}
p{max-width:46rem;margin:.4rem 0 .9rem}
.lead{color:var(--soft);font-size:1.08rem;margin-bottom:1.6rem}
.soft,small{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(12.5rem,1fr));gap:.9rem;margin:1.2rem 0}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:.9rem 1.1rem}
.tile b{display:block;font-size:1.9rem;line-height:1.2;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile span{display:block;font-size:.88rem;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19.5rem),1fr));gap:1rem;margin:1rem 0}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:.8rem .8rem .4rem;min-width:0}
figcaption{font-size:.92rem;font-weight:600;margin:0 .2rem .3rem;overflow-wrap:anywhere}
figcaption small{display:block;font-weight:400}
svg{display:block;width:100%;height:auto}
svg text{font:10.5px system-ui,sans-serif;fill:var(--soft);font-variant-numeric:tabular-nums}
svg .name{paint-order:stroke;stroke:var(--card);stroke-width:3px}
.grid{stroke:var(--rule);stroke-width:1}
.level{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:4 3}
.line{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round}
.band{fill:currentColor;opacity:.15}.dot{fill:currentColor}
.hit{fill:transparent}.hit:hover{fill:var(--ink);fill-opacity:.07}
.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}.c0{color:var(--c0)}
.legend{font-size:.84rem;margin:.2rem .2rem .4rem}
.key{margin-right:1rem;white-space:nowrap}
.key::before{content:"";display:inline-block;width:.9em;height:.2em;background:currentColor;margin-right:.4em;
vertical-align:.25em}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;min-width:60%}
th,td{text-align:right;padding:.42rem .9rem;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{font-weight:600;font-size:.86rem;color:var(--soft);vertical-align:bottom;white-space:normal;min-width:6.5rem}
tr.last td,tr.last th{font-weight:650;border-bottom:2px solid var(--ink)}
tbody th{font-weight:400}
.bar{display:inline-block;height:.55em;background:var(--c1);border-radius:2px;min-width:1px}
.sheet{display:block;max-width:100%;height:auto;border-radius:4px}
td.text,th.text{text-align:left}
.long{white-space:normal!important;overflow-wrap:anywhere;min-width:9rem}
.facts{display:grid;grid-template-columns:auto minmax(0,1fr);gap:.35rem 1.2rem;margin:1.2rem 0;max-width:60rem}
.facts dt{color:var(--soft)}.facts dd{margin:0;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:1.6rem 0 0;font-size:.92rem}
a{color:var(--c1)}a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--c1);outline-offset:3px}
.part{fill:currentColor}
.maps{display:flex;flex-wrap:wrap;gap:.5rem;padding:.8rem 0;border-bottom:1px solid var(--rule)}
.map{padding:0;border:0;background:none}
.map img{display:block;width:104px;height:104px;border-radius:4px;image-rendering:pixelated}
.map:first-child img{image-rendering:auto}
.map figcaption{font-size:.76rem;font-weight:400;color:var(--soft);margin:.15rem 0 0}
.tree{list-style:none;margin:0;padding:0}
.tree .tree{margin-left:.6rem;padding-left:1rem;border-left:2px solid var(--rule)}
.tree>li{padding:.15rem 0}
main>section>.tree>li{padding:.8rem 0;border-bottom:1px solid var(--rule)}
.node{display:flex;flex-wrap:wrap;align-items:center;gap:.3rem 1rem;font-size:.86rem;color:var(--soft)}
.node>span:first-child{flex:0 0 16rem}.node b{color:var(--ink);font-weight:600}
.strip{display:flex;flex-wrap:wrap;gap:3px}.strip img{width:56px;height:56px;border-radius:4px}
.tree .tree .strip img{width:44px;height:44px}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1rem;margin:1rem 0}
.pairs img{width:100%}
.solid{border-bottom:3px solid var(--c1)}.dashed{border-bottom:3px dashed var(--c2)}
.near{display:grid;grid-template-columns:auto 1fr;gap:.4rem 1.1rem;align-items:center;padding:1rem 0;
border-bottom:1px solid var(--rule)}
.near>img{border-radius:6px}
.near>ul{min-width:0}
.near ul,.rows{list-style:none;margin:0;padding:0}
.rows li{display:flex;flex-wrap:wrap;gap:.3rem .5rem;align-items:center;padding:.15rem 0}
.rows .eyes{flex:0 0 6.5rem;font-size:.86rem;color:var(--soft)}
.thumb{margin:0;padding:0;border:0;background:none;text-align:center;font-size:.74rem;line-height:1.3;
font-variant-numeric:tabular-nums}
.thumb img{display:block;width:56px;height:56px;border-radius:4px;border:3px solid transparent}
.thumb.yes img{border-color:var(--good)}.thumb.no img{border-color:var(--bad);border-style:dotted}
.thumb.yes{color:var(--good)}.thumb.no{color:var(--bad)}
.missing{color:var(--soft);border-left:3px solid var(--rule);padding:.1rem 0 .1rem .9rem}
pre{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:1rem;overflow-x:auto;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details{margin:1rem 0}summary{cursor:pointer;font-weight:600}
@media (max-width:36rem){.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:.6rem}.node>span:first-child{flex-basis:100%}
.map img{width:88px;height:88px}.tree .tree{margin-left:0;padding-left:.6rem}.near{grid-template-columns:1fr}.rows .eyes{flex-basis:100%}.thumb img{width:46px;height:46px}
th,td{padding:.4rem .5rem}tbody th{white-space:normal;min-width:6rem}
thead th{min-width:4.5rem}}
@media print{:root{color-scheme:light}body{background:#fff}main{padding:0}nav{display:none}figure,.tile,.near,.maps,tr,.pairs img{break-inside:avoid}
h2,h3{break-after:avoid}}
"""
