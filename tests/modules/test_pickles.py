"""Pickles hold stable names, and those of before the package had folders load."""

import base64
import copy
import io
import lzma
import pickle
import pickletools
import sys
from typing import get_type_hints

import pytest
import torch
from torch import nn

import inception_fused
import stem_cases
from inception_fused import FusedInception, Inception, TorchvisionInception, backend, convert, explain, revert_

OLD = """
{Wp48S^xk9=GL@E0stWa8~^|S5YJf5;J6zVxm^H20S<0ga7ZGaeQ1et0od}3uTdz7kFUptpPx7+x=5^o21^_j>Zt(3#3}rB_Y<qSlFwFHp}!SfI!Pg+Ya$
UodkZCr4Gs@~4A={mxg_XMHW@Vis?I}oi%><ck12cd{I$-#df-$ar||CQX(CQiUhLsls+7_pL}}fu>kh0!E<!P=Y(m`adgZ;I^z|~gJ!t_`K%{9hz?IyP1
~GOWav<Govdvv-P(GP76;6vwz?{aye6%C<!}{juMaT)HUZgTEJSbs`mwPvUN_n)3Gr~<P1Yiyo&YSt*Pa_cNUFKz-SZ5e*J>#^;pnj0>tq%folnkapsDyd
aBO^H5={3y-&$KSRq^1KFZWUse2U_QlO=>+x!`M9~w%4N(4j_>UEs6Vhf?b)m2&Pghd{`B@2GHqP8hV=DE{js3T-L2M9TKF2#Mx2{BKsdMYgMW70s%<FaL
t{-(G>x_yUJzh=8^?Cd(!tHT+89J%LB^R{S?I2Cpc@OSBYjqiG%ZjqGR3nBw|eyPPOjQsecwiGNz96?vkeZ*IoEr!g#&|qv?aEn!kO<5M{=+b$~!Za<s3{
pDqhuK!Zi*hCaH^=3*(((|%=3DvA7ZVXbw+Yj*TZiil>&ZaPO>Sq6nr18}q^5!XkGD{r(P`N)B<%GzMDU(Jo;{;dylR(@IMDUA5J?_wO<3g&rK6=j$~j|U
5mEA1}pVxXj>S(8mPPu<OHxWMFS)z1#A73QcbcTg)#QWbA`+3BrRaGEyi!CZwyJPZ2YHx<W<0`%7=CZ#?@iu<^11Lxz!yS)E8xKN64&=%Ed0NH`d5+B|dx
9%X3CI@yf(DfGx@rl8z*C}(vE)zgW?s$7dvAkBEqoz0Sk9NN`wGN>{x58)3yZq6sz{8N)4UBen`KVL@$^{XNak>ul!wMXMg^TfbVVx$BCO|9E=o_Gt$d3?
F---$}*dj4vuL?M2`WFh1Oah_?aIZFgtWx=UYC;1RfBGRGOj6YCWE*g-MAhPod!u_gj%AryVXDi{EzS-pZ^atbVaaBqlX<t&hztJ+>_kQx{#*(8pSC&43L
tOMSb0#cjvzqzVf+!^i%CLhyysV>aIwtZZWp7b(H@({v%q$NmlABb&;Ry@dkU+8ApcJ6ZlP;|Ee8X9Kk332zxM09*E07PWg+Z1Jq+A+sYATOvbCo8J;^C3
sC#yfG@&X<FAg8fykeas$so86?zmPGYP){z?&+QGKgW>q6b9P#&j$5FAK<9+0|PmwBR^t5Y7Si|BU+}6Q8j{mLo}RfGW4RmF4KOcdC;?YGZ)YYd|Q1adqd
wEGt=yN!fb*(;pt!lFz!Tf46o?1MMOhLd?&f8gGh3|JxkTZ-<Y4gn?uHcVX$dDnQ4OSMS8cCaUYI-oP5(?y3G?-cHs(JoB9oJH9Z0qZCLa3vze&rnU+Ez2
wmuaT7VYCdXeC+f+_-V_k>@V$WN9*ur6UiygfhtPKb4F>)DC;QhnFyf}X3|#DjprAF}KtXk&$jxnSjN?5i~t){q@$m!tl2EdwE`tnO}bLH|aGpC7Txe%!3
ZFDmL1rErgd#*}CYthalv*-rf_p)IYG3N{s#aW^2!&=|kuc(gM^D*p{DuhB@zTK9J#0k0VuNR?(?Y`@(@2IS@`HRKx+BmG|#i=qdj+1=dn05mMsJT_Xzys
fSgU)jEhLPkWRJA$IWMxIi>NO9i^Xf#gY5IL11AxZ_NM3(b&bUU!@`ski-UK+0i=mh+@t|J!z?#)bx!6_0DZ05EpQT=E~ljDJ?+%)6w5o*&~y8FtGoVK&e
7J|(9lu0f9$<~EQ97M$7mWLj8Yophb!vnEAQxVct5iU{R%*2>^lf>ui5DPF9n9L!-=b6}OF1L`E1cq~}Pg=JGRaMvD<a+SqOqFH;ys_N0ZkZuy=RcLyAMf
2Z;mh`L&`PwopGOxf0&sfswFo%zJ5(J7R90*tsLr$g*(+_0oDp4f90c_Z>BNfdnTDBn3FuE~V2GBEB!@3_aZ=^xEzzHXM=%<wyQ%J+qHiozyJhXLLiS|%b
p0>}^@M%bz6e>V*Rfx(eU1(3rUe}2&Mq>yF|_F}A5XSok6`re%+8fnLF4Y`Bo*1;l-#E_N{%k|_viKoxe_lGLuJ84q|PJ_t0*jwHncR?UIysvg?g@bhS6m
{-T-RCTDgp9H~15(u-+r>PQdkSo*G`D6Uab&ijSOLs_@|_jJsZ1{5I%9RaYs^cutMGVH{I~0$(_2<jcXxZa+4)B-#OK>k$6a!)rw(!K{(wuX13QP_mK-py
0sgY2U?lJz7QZZ-x!2DjDy2=4l&+#e^x{L}1CMe>c_iAu<rxv0UyGBGrM|K~c|nLowMe3w0tI<B%ufvRvs>fhmiwRGM82uOS;fHcCusw5Fh8f7(~WfTQ)?
n=a`k4jjJ;jM=(1-U;QvTE4W9?I=`)4zPzrvPqNw(;(w@)FE8`=vPiwh;LU-7-%xpwzAJoI09^^%l9S0n{DZ#W5n3BY~~*c6h%NSTfQZk*Qo8I@+6_-RWz
$cbdsfPemZh(OU{F3AxV)W^2zSE#DdVv{Ic-Vs%!V%d170<_6NsUgv)_yfRNgZ(7MWRaV`T&&R*EId)#%7yq0zgCc$BlAJv<jn#mC>6Cjv(JK*c4m9*|>I
|5)fe^KEO`C^@NBQYjtGy6o>^z#MIZ>;-HtY${R#vB~IVygPd(H_>%ZM}I)LGm{BBYmhB+8eV$tpiZeQfG#LM;?)6eN+uBBV6T`ccklqegL8;!w$4g`2sT
|>`Q4T^gg-!7zHtn()dDAf)0>Iz{TmtcSx*dcLUaIg+n<{pBYO3#?)C~DfMkATXkp+l_%G5wy@34XB~#1avr;dN?yDIT*t1VAA!P#_edu-B8#sb6M9x{=?
1$l3cp@~0V018h)^U3FTYP_fYJ`Td7&Zul+Xn9_%~1)4Ic+PDqSW%i+VajPS#9S4UAvIJq++<;Qh9jek;yuy_Z%|={Hxvcv~3!$aOLugR*>7*rFQeK~gvu
@E4#ok<YBd8-Zbd?SuJw0goQTSh4E;h}fNKUj}pnNLThx0P1=P`jYtzDli0A(#63CXlWcOU3x}oW6)CAzg}YEyxTkW3aT^x<t+6yw1b$%IA}GOeYltG(%h
UEiMhlTUvwLn8H;cw$JIu!3k(M|)GSt{*0UxWzv4JqOE#X)ko{bW#PinID}m3k&2(b6!;*AF$w;4l-vEN57wAQ9>gT@lH8t)WWh++aNeLlIfh0ox$#}jf;
$6e>@a4b?l%ldiUa6%iQ|8^l2J3)$lDHnk9r4KU`5RcK$_fP!zBtkexn}0UuA7Z>iBB^t(Qn&lolTnc+`#^3(BV0sWf`nB0vH~OCD*cnD}JTIJXcY?iJFT
E+qtzF(;m9`OnMrxx5TtNy<Auet)eJL?G+X$3wNUBl$hV#nj$2$1qkRIqg*>8QpK4#M_B;{lxD&1#Xbm|=%b<S*ECb=JqF}duR|&ca^gRaP5_lf_+%3MdJ
OFr2XG4MI1Gg(By0$x%V3s)sff2=8~4TD(ZV0g^u~j20^oRN|J!)mWI}KRJW%#K;4Kfd9)<Yx0m>-j#K2FReg)`xb{qR@q}IbyWC)lY+E`0wT#6Sdf?o@T
`q;#2z>>OO{JB;F*`Q*%&=1fnueP%Y!1_C6!gHI}y?F)c;So0n1w+wP<bKc1U~yOCmz++v6R`q(Zb87LGbc7+z8>flk?lX8TltOUUH6KGRT`h|ELPr91Q2
py)yq?rTTeo<SVa7^6<AFVki@}!Vqx1mcuK|&&TxdA4QVp#%Sc8Wl2_UtK`L0Cz+!o_4KjC<vZW?EA6LCjmt!y~d$eWugnMYu3pJGP?=isfnwc$U^cUZ4q
nanPmkBv5ZEjoc$s&O+bbtUcJ@^H7R(5<A3>fZf`aUhx(qtq`i4n<k+>Jxi5!f!a7_fPHBi!CT<KoH;M%+bwuX9O~#ai}3X&a;3=CVd8;8$>GQGmpy=)b(
bUV6qVI&6Dz6doVqZKD*tIiD;%o%et@EtZkZ-;0r835V-$fk7w+8>C;vS^k|Fjdkrc><+Hf>rj%e9rCwl{6IJQYY{czePeG>-WwDFp3i`z)=rWyY2g)fA5
7U)R5ZV8{|;Q6M`6jQ{=&k{wIk{eN^8~1r^IkGatx*+IH!_MspcTy*%i<h5`f`1BlN1-$WX{;>;RtD7TLc8V|0b+Q<M3cfZ`IO0FGGAz8po%Zy<=F5xhL5
h%>{~(hC+xfP!Bn++OrnR<20?A3#dbcA`we8?x6W-c93HAn8MAaq8Tw2)fN{?qnkXqZAg{z*#X*hnQ5-tm9y=(;&nNM!D;T!h1uqXfyfK>8^|#Sd;he5NL
NgGoO^_0%Q|N^(nu{ScEc%Z#3#6w-=CNjM-<n;lRVxQaxUt5-#w${Hv$`J0->vc0d7FX=KY^v8Af*^1WbFE9Q6tB(ffgDj260wIA3l4-)WAi`;r@xPMr#j
j*x=2ED_-h>r=V7Mlz$gzUYG_&0PeJOK-!*qM8yEPT;nK5fNueq7yFYtc^|TeK1XKa>*9A9k8c$}aBcZ}dSxgP6q)*W8qVi#Q${0m4klKf$rUhwW1d2}B5
Vf#-<H2aUe9{|Wlr)9}F+dEi_#dheaWt{P{KE{sCtuz#kyXZ=p*dF~5DeaN5%VPPyW>rb*tJA}%u=gA_S|4RrSe}d&Vj}DyCxRP)S`t&M9ssyn$?Y>EL5R
ZGikAz#N2XF0fT>__u+L_;8{-mpk-R<t<bu@~9YEVW*MvhL>Q|}XYN|2rGk*Ndyxl|T{bO@5OTMs!N?y%e6=_dPzDk`Q_3<hOjbMR?8BiYP|FRjx}?{N0*
Ns$?IN)q^z{pU8R5^er7&23)t_w*u-BY-!;lb0S%QXkt#p}P@;f(H)~sXzx3TD*c4cf-#c;k^4^3c80RF{h3{h|yr6Ny@_mP0^H*g`mSwTW6AiPHT>F^L|
P^Ala2tUSx2(c2Pv?PfZ>7IZ+7<6&aZKX$#KAv|Q$mYSS<+SDWN;R8J^`?*hc!g6?fI#Mxt~V`BLumADIKsn&AAVRs_a9+>oMJD}M*CzNVdq^>Yg?kjZ4b
lUa<#``)I`69QIRH7FgEtkA^#~i!`i2f|m>R+{{O&^Z;U?BIAF6ti=G&%RGtH*rZC@<g#s7D+FekIIv8gZEB1ACQX3D4wYGf-|=S8^V4$lc85KIvsMvRS0
tMEs<88{+E^ld7;~sygnUZLaa0D>BD1<Qx&gXkn(`F6ju{FoFvtN<`A-v{&k=Xl%D&*fyM9ti}>_&)F01lW$c&T-`XVr+`b&9Oi4;>T|R$h7VWrgn^vOyG
wi3+>O_$Vd`{I%TRK&nG=>_Sw%okyT;*JIrP)|RezeJH@<0WPM=^wS302I4Q=HZEEhisd~F?z(YRTMI%vW!H(D9IKdsj+0^V6}Rqx40MXZ<pz^mKUa8r~$
e~+r~>CcEzd%MB9yiYCw_GB->Yb^ZC39qv8uPQ9Kw({y`G9P0QhBrZLl*(Qv-<+Er#oYdsl#L_QQIsR++g%Z_$TofxH0#-6k*gTYZ1bRio(|~^`505%i**
Km)yRV`nncb?wVE#7M`iKCHMwdSc#1XZv6OJoYuU#+L+FSrlL%lXFk&n5Sl`bltf+ddaeKsY_9|X?gni@fzKV^=p6R(#7Z8lU>PQZ$2UP8&m_yU>d+djMV
WH^$GM<Y0uUGB93($|fso1o3EzL$IJPChj@v5hIK38J&WE4+gtV*pZH(6V{i<_l?vg!lEUfv_Ws*clhH7F1jO?SGFxj@{w5uq!+TkqQ4w+F{b2}F=Eth8H
6x<^L}{n9ij9@Rw_X6G|#E=HmlH68}ue$grpfHEBmfAk4;o1dKWu)(bmSGc<!>pKN3XW&==Q0yQ3Y0~CY9E}3vE+WC|YH>NbAk!{1?@x_3<o<531un?(vG
{vo0Ny42LxJ_MWS8i(uLWE*#FinGPw1Lnt#S3()ueUdB6MQL*hgnPpRmP%r%CZrhA1m#eYH08gQE%|uvE=b2jMB~@HF%+Qa7*kO0ziH54q1OBLp}g<i8{`
;_fj_&$aMZqsf@kZA0+u>&~ip!+gEE(vOEz`}t8?-kyjF=m`Z3<4b5apPdC1T=%sVaD#6g<^?7E&1E|gz#~bV=5m1~uQ60*o0$yCG>lvVSrfqUHzw8uRxg
0j4@n{+`BtsQ0Z3g~(5<pSWo@~pUJrQx?FnMSr`p!8ETX&jXQTyCL<VmWGToFW9*eCZO!x0U8rA8(-by)@;c4|ytS{#Ith3JD$g|zPmH{#?EM7wdMq6**(
=4t?ZY8{B>JK-cAT!mBqzEy=5<EgxHPX*4CI0{$6MQ<61nuJ$I8p~X@FjR!O+B<3^~#o~;U7T&!&1bc7V|xDIr4nU;Z9IF2`|mueX(>0-eOGX<lvGa+xt)
R>-+4}!aq~x4CI(BP03PmG@T5xa24W2bs-0f$F%g8cl=bwMY_@$Y%yzMx&!0UmwZtBn&v{9sJ_%0<~YP#Cm_CyAAOAZ7+DQn=Rb&j$etUk0rF7wPZpgBlv
=^L=W;XnIk{1JC`Y9lH}W~Kr(=J3L@|Q`D)<JRLOqgHD~TLU14R@S+x5Yhv8+Z)J!e;4&S-j%;C5Lt)=q!lG+#94mEGqjQh88A5yAziki-6crxHeBeF~*$
($LSt-K@44t^wEF7I}J`Q6-yBf+5SwMb362$H+f1HYYov=di%r->&i**`cS}^ew)ncq#me6A3*z-a;gBws0}0@5f3=wP4EWuOxPrEjD!`#yZi>9IZd}^Tv
6a<5v;~7<eGtp-gD`!{NF*x(WO!W<Cgu1uEePf8L7QlPaA$$>KIC{)kCJ%D1P8D`CkSPd7(oh}IdJ5l{!10-?>w04@}}UPMb74&j&*4{D9vm_a~ig_Sp`S
O;dvJC2j`2o{FQ0(Z1Jw`#^~J!-0M5&r<1N{UuU%=t}xK4td$PGs%7y9y&Ov9q}}5Vy#VdfB>lnqKS!lD0c0e0PapG38&CoyB(}s{7iY@hjxI9>8Y_Iegb
x;qj&XIFqt1n6HLV@@U(#Rry#JoTHbwGcW~;N%E4MmZ-}E^W@Oj=b+$wn=;M*@4NwR3)SPCnsjBF)-F?%zn-o%wjue3=`W6NKB(9F0%rD`AV7ye0C=4sN;
Ew?;5+<o-uQk$zi2x=0tdVBR<^kS00000#6%|Lb|ZBj00Gr2obUnw8VJ)zvBYQl0ssI200dcD
"""
"""Blocks of two channels, parameters and a configuration as version 0.1.0 pickled them, an input and what came out."""


@pytest.fixture(scope="module")
def old():
    return pickle.loads(lzma.decompress(base64.b85decode("".join(OLD.split()))))


def names(data: bytes) -> set[str]:
    """The modules of this package that a pickle names."""
    found = [arg for _, arg, _ in pickletools.genops(data) if isinstance(arg, str)]
    return {word.split(" ")[0] for word in found if word.startswith("inception_fused")}


def test_old_pickles_load(old):
    assert set(old["items"]) == {
        "FusedInception", "Inception", "GoogLeNet", "TorchvisionInception", "converted", "InceptionParams", "BatchNorm",
        "InceptionConfig", "state",
    }  # fmt: skip
    for name, item in old["items"].items():
        if hasattr(inception_fused, name):
            assert isinstance(item, getattr(inception_fused, name)), name
    assert isinstance(old["items"]["converted"], Inception)
    assert set(old["y"]) == {name for name, item in old["items"].items() if isinstance(item, nn.Module)}


@pytest.mark.parametrize("name", ["FusedInception", "Inception", "GoogLeNet", "TorchvisionInception", "converted"])
def test_old_blocks_compute(old, name):
    with torch.no_grad(), backend("eager"):
        torch.testing.assert_close(old["items"][name](old["x"]), old["y"][name])


def test_old_converted_blocks_are_converted_blocks(old):
    for name in ("TorchvisionInception", "converted"):
        block = old["items"][name]
        assert [row.state for row in explain(block).rows] == ["converted"]
        assert type(revert_(copy.deepcopy(block))) in (Inception, TorchvisionInception)


def blocks():
    sizes = (2, 1, (1, 2), (1, 2), 1)
    return {
        "built": FusedInception(*sizes),
        "converted": convert(Inception(*sizes)),
        "torchvision": TorchvisionInception(2, 1, 1, 2, 1, 2, 1).eval(),
        "parameters": FusedInception(*sizes).params(),
        "configuration": inception_fused.GOOGLENET_BLOCKS["3a"],
        "stem": nn.Sequential(FusedInception(*sizes), stem_cases.fused()),
    }


@pytest.mark.parametrize("kind", blocks())
def test_a_pickle_names_no_inner_module(kind):
    data = pickle.dumps(blocks()[kind])
    assert names(data) <= {"inception_fused", "inception_fused.pickles"}
    assert "inception_fused" in names(data)


def test_torch_save_and_load():
    for block in blocks().values():
        file = io.BytesIO()
        torch.save(block, file)
        file.seek(0)
        assert type(torch.load(file, weights_only=False)).__name__ == type(block).__name__


def test_public_names_say_where_they_are_public():
    for name in inception_fused.__all__:
        item = getattr(inception_fused, name)
        if callable(item):
            assert (item.__module__, item.__qualname__) == ("inception_fused", name)
            get_type_hints(item)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("conversion", "convert"), ("conversion", "convert_"), ("conversion", "revert_"),
        ("function", "FusedInceptionFunction"), ("function", "inception"),
    ],
)  # fmt: skip
def test_old_names_of_what_a_configuration_holds(module, name):
    data = f"cinception_fused.{module}\n{name}\n.".encode()
    assert pickle.loads(data) is getattr(inception_fused, name)


def test_an_old_module_has_what_pickles_take_from_it_and_no_more():
    old = sys.modules["inception_fused.module"]
    assert old.FusedInception is FusedInception
    assert not hasattr(old, "_PRISTINE")
    assert not hasattr(inception_fused, "module")
